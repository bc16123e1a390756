# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: trainable_token_indices on a model whose head is tied to the embeddings leaves the head W x + b as it was: at
#   the start the model is the base, as with any adapter.
# Seen: the wrapped head computes W x, and its bias is gone from the first step on. Nothing is said.
# Matters: whoever trains some tokens of a BERT for masked words, whose tied head has a bias.
# adaptc: the bias stays (adaptc/methods/trainable_tokens.py; tests/methods/test_trainable_tokens.py,
#   test_a_plan_of_ones_own_starts_as_the_base_and_keeps_its_bias).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "LoRA alone: as the base True, as the base without the bias False
with trainable_token_indices: as the base False, as the base without the bias True"
import copy

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)
base = transformers.BertForMaskedLM(config).eval()
bias = torch.nn.init.normal_(base.cls.predictions.decoder.bias).detach()
ids = torch.tensor([[5, 6, 7, 8]])
for name, options in (
    ("LoRA alone", {}),
    ("with trainable_token_indices", {"trainable_token_indices": {"word_embeddings": [5]}}),
):
    lora = peft.LoraConfig(target_modules=["query"], **options)
    model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    with torch.no_grad():
        wanted, found = base(ids).logits, model(ids).logits
    print(
        f"{name}: as the base {torch.allclose(found, wanted, atol=1e-6)},"
        f" as the base without the bias {torch.allclose(found, wanted - bias, atol=1e-6)}"
    )
PROGRAM
