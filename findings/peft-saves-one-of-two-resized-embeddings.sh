# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: save_pretrained(save_embedding_layers=True) writes both embeddings of a model with untied ones, embed_tokens
#   and lm_head, as its documentation says and as it does for target_modules=["q_proj"].
# Seen: where one of the two has an adapter the other one is left out of the file. Of a vocabulary that was extended its
#   new rows are lost, and nothing is said.
# Matters: whoever adds tokens and adapts embed_tokens beside the attention: lm_head is that of the base, with rows at
#   random after the next load.
# adaptc: both are written (adaptc/runtime/embeddings.py; tests/runtime/test_embeddings.py,
#   test_outputs_are_pefts_and_files_are_read_by_both).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "targets q_proj: lm_head.weight, model.embed_tokens.weight
targets q_proj, embed_tokens: model.embed_tokens.base_layer.weight"
import peft
import safetensors.torch
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    tie_word_embeddings=False,
)
for targets in (["q_proj"], ["q_proj", "embed_tokens"]):
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(44)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    model.save_pretrained("adapter", save_embedding_layers=True)
    saved = safetensors.torch.load_file("adapter/adapter_model.safetensors")
    whole = sorted(name.removeprefix("base_model.model.") for name in saved if "lora_" not in name)
    print(f"targets {', '.join(targets)}:", ", ".join(whole))
PROGRAM
