# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Guess: LoRA on an nn.MultiheadAttention computes with W + s B A for its out_proj, in the forward, in the backward and
#   merged.
# Seen: the forward and the merged layer use W + 2 s B A, and B gets the gradient of half of that update: PEFT adds the
#   update of out_proj when it merges the attention, which merges out_proj inside, which adds it again.
# Matters: whoever trains attention of torch's own with PEFT and reads or writes its adapters elsewhere: the outputs
#   are not those of the formula, and the optimiser steps by a gradient that is not that of the loss.
# adaptc: the formula, once; reading or writing such a file says the difference (adaptc/methods/lora/attention.py,
#   peft_difference; tests/sites/test_mha.py, test_what_peft_computes_from_the_same_file_is_told).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PROGRAM' | seen "the output is that of W + 1 s B A: False
the gradient of B is that of W + 1 s B A: True
merged, the output is that of W + 1 s B A: False
the output is that of W + 2 s B A: True
the gradient of B is that of W + 2 s B A: False
merged, the output is that of W + 2 s B A: True"
import copy

import peft
import torch


class Host(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


torch.manual_seed(0)
base = Host().double()
x = torch.randn(2, 5, 8, dtype=torch.double)
lora = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attention"], init_lora_weights=False)
model = peft.get_peft_model(copy.deepcopy(base), lora).double()
parts = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
A, B = (next(p for name, p in parts.items() if f"out_proj.{factor}" in name) for factor in ("lora_A", "lora_B"))
for name, parameter in parts.items():
    if "lora_B" in name and "out_proj" not in name:
        torch.nn.init.zeros_(parameter)


def formula(times):
    weight = base.attention.out_proj.weight + times * 3 * B @ A
    return torch.func.functional_call(base, {"attention.out_proj.weight": weight}, (x,))


output = model(x)
(gradient,) = torch.autograd.grad(output.sum(), B)
merged = copy.deepcopy(model).merge_and_unload()(x)
for times in (1, 2):
    wanted = formula(times)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), B)
    print(f"the output is that of W + {times} s B A:", torch.allclose(output, wanted))
    print(f"the gradient of B is that of W + {times} s B A:", torch.allclose(gradient, wanted_gradient))
    print(f"merged, the output is that of W + {times} s B A:", torch.allclose(merged, wanted))
PROGRAM
