# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: LoRA on dt_proj of Mamba is refused as on out_proj, whose weight the mixer reads too; or else it acts, and a
#   merged model computes what the adapted one does.
# Seen: it is taken, and does nothing: the mixer reads dt_proj.weight, which is the frozen one, and does not call the
#   layer, so that the adapter gets no gradient. Merged it acts: the outputs change.
# Matters: whoever names dt_proj trains nothing there without being told, and merges what initial values or an older
#   training left in the adapter.
# adaptc: a warning when the adapter is added, and merging such a layer is refused (adaptc/plan/bypassed.py,
#   adaptc/runtime/folding.py; tests/runtime/test_serving_classes.py).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "adapted, the output is the base's: True
the adapter has a gradient: False
merged, the output is the base's: False
on out_proj: ValueError"
import copy

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
base = transformers.MambaForCausalLM(config).eval()
ids = torch.arange(12).view(2, 6)
want = base(ids).logits


def adapted(target):
    lora = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(base), lora).eval()


model = adapted("dt_proj")
output = model(ids).logits
print("adapted, the output is the base's:", torch.equal(output, want))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
gradients = torch.autograd.grad(output.sum(), trained, allow_unused=True) if output.requires_grad else [None]
print("the adapter has a gradient:", any(gradient is not None for gradient in gradients))
print("merged, the output is the base's:", torch.allclose(model.merge_and_unload()(ids).logits, want, atol=1e-6))
try:
    adapted("out_proj")
except ValueError as error:
    print("on out_proj:", type(error).__name__)
PROGRAM
