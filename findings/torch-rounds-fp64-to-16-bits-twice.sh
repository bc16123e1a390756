# Versions: torch 2.13.0
# Guess: a tensor in fp64 that is cast to bf16 or fp16 becomes the nearest value of that dtype.
# Seen: it is rounded to fp32 first, and then again: a value just past the middle of two neighbours, by less than fp32
#   shows, becomes the middle and then the even one of them, which is the farther.
# Matters: whoever computes merged or converted weights in fp64 so that they are rounded once.
# adaptc: merged weights are rounded once (adaptc/methods/affine.py, nearest; tests/methods/test_affine.py).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

finding torch==2.13.0 <<'PROGRAM' | seen "torch.bfloat16: nearest 1.0078125, cast 1.0
torch.float16: nearest 1.0009765625, cast 1.0"
import torch

for dtype in (torch.bfloat16, torch.float16):
    step = torch.finfo(dtype).eps
    value = 1 + step / 2 + 2.0**-40
    neighbours = [1.0, 1.0 + step]
    nearest = min(neighbours, key=lambda one: abs(one - value))
    cast = torch.tensor([value], dtype=torch.float64).to(dtype).item()
    print(f"{dtype}: nearest {nearest}, cast {cast}")
PROGRAM
