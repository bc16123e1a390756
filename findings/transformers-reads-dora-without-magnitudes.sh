# Versions: transformers 5.23.0, peft 0.21.2, torch 2.13.0
# Guess: transformers documents that from_pretrained reads the folder of a PEFT adapter: it gives the model that
#   PeftModel.from_pretrained(base, folder) gives, as it does for LoRA.
# Seen: of a DoRA adapter transformers leaves out the magnitudes. PEFT writes them as `...lora_magnitude_vector`;
#   transformers looks for `...lora_magnitude_vector.default.weight`, and goes on with those of a fresh adapter. Only
#   the report of the load says so (UNEXPECTED, MISSING), which is hidden at TRANSFORMERS_VERBOSITY=error.
# Matters: whoever saves a trained DoRA adapter and reads it by its folder, or has sentence-transformers read it, which
#   does it this way: the model answers with what DoRA has not learned.
# adaptc: a whole sentence-transformers model with DoRA is written with the adapter folded into the weights
#   (adaptc/files/composite.py; tests/integrations/test_sentence_transformers.py, test_kinds).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "PEFT reads the magnitudes: True
transformers reads the magnitudes: False"
import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)
transformers.BertModel(config).save_pretrained("base")


def base():
    return transformers.AutoModel.from_pretrained("base")


def magnitude(model):
    return next(p.detach() for name, p in model.named_parameters() if "lora_magnitude_vector" in name)


trained = peft.get_peft_model(base(), peft.LoraConfig(r=2, use_dora=True, target_modules=["query"]))
magnitude(trained).add_(0.5)
trained.save_pretrained("adapter")
for name, model in (
    ("PEFT", peft.PeftModel.from_pretrained(base(), "adapter")),
    ("transformers", transformers.AutoModel.from_pretrained("adapter")),
):
    print(f"{name} reads the magnitudes:", torch.equal(magnitude(model), magnitude(trained)))
PROGRAM
