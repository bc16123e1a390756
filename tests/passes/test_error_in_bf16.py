"""A step in bf16 is as near to fp64 as the ops' own bodies are, with the same masks, and rounds no scale."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import nn

import adaptc
from adaptc.ir.ops.dropout import keep_mask
from tests.models import hosts
from tests.reference import as_double, factors_of

INDUCTOR = pytest.param("inductor", marks=pytest.mark.inductor)
SLOW_INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
#: Bodies of the ops, one by one.
PLAIN = {"order": ["insert", "seed_dropout"]}
P = 0.1


class Masked(nn.Module):
    """y = x W^T + b + s * (dropout(x) A^T) B^T in fp64, with the mask of the seed that is drawn next."""

    def __init__(self, base, A, B, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.A, self.B = (nn.Parameter(t.detach().double()) for t in (A, B))

    def forward(self, x):
        mask = keep_mask(x, torch.randint(2**62, (1,)), P)
        return self.base(x) + self.scale * (x * mask / (1 - P)) @ self.A.T @ self.B.T


def in_fp64(base, adapted, batch, seed):
    """Gradients of the adapters by the formula: A and B of each site, in the order of ``parameters()``."""
    model = copy.deepcopy(base).double().requires_grad_(False).train()
    sites = []
    for path, ((A, B, scale),) in factors_of(adapted).items():
        parent, _, name = path.rpartition(".")
        site = Masked(model.get_submodule(path), A, B, scale)
        setattr(model.get_submodule(parent), name, site)
        sites.append(site)
    torch.manual_seed(seed)
    model(**as_double(batch)).loss.backward()
    return [parameter.grad for site in sites for parameter in (site.A, site.B)]


def error(found, wanted):
    """Norm of the difference over the norm, the mean over the gradients."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return statistics.mean(errors)


@pytest.mark.parametrize("backend", ["aot_eager", SLOW_INDUCTOR])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_model_with_dropout(backend, adapter_dtype):
    base = hosts.build("llama").to(torch.bfloat16)
    batch = hosts.batch("llama", rows=8, length=64)
    plan = adaptc.LoRA(r=8, alpha=16, init="random", dropout=P, targets="all-linear")

    def compiled(passes, backend):
        torch.manual_seed(0)
        whole = adaptc.Plan([plan], passes=passes)
        # Inductor's own generator draws other seeds than torch's.
        options = {"fallback_random": True} if backend == "inductor" else None
        model = adaptc.compile(
            copy.deepcopy(base), whole, backend=backend, adapter_dtype=adapter_dtype, options=options
        )
        return model.train()

    model, plain = compiled(None, backend), compiled(PLAIN, "eager")
    errors = {"all": [], "plain": []}
    for seed in range(5):
        wanted = in_fp64(base, model, batch, seed)
        for name, one in (("all", model), ("plain", plain)):
            one.zero_grad()
            torch.manual_seed(seed)
            one(**batch).loss.backward()
            errors[name].append(error([p.grad for p in one.adaptc.parameters()], wanted))
    other_masks = in_fp64(base, model, batch, 99)
    assert error(wanted, other_masks) > 10 * max(errors["plain"])  # or masks would not matter
    assert statistics.mean(errors["all"]) <= 1.1 * statistics.mean(errors["plain"]) < 0.05


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_bf16_cannot_hold_is_not_rounded(backend, adapter_dtype):
    """Factors that select columns leave the scale as all that is multiplied by: each result has its own rounding only.

    bf16 keeps 8 digits: a rounding changes a number by up to 2^-8 of it; that of this scale would by 0.81 of it.
    """
    scale = 15 / math.sqrt(3)
    unit, rank, size = 2.0**-8, 3, 64
    base = nn.Sequential(nn.Linear(size, size, bias=False)).to(torch.bfloat16)
    nn.init.zeros_(base[0].weight)
    plan = adaptc.LoRA(r=rank, alpha=15, rslora=True, targets="all-linear")
    model = adaptc.compile(base, plan, backend=backend, adapter_dtype=adapter_dtype)
    A, B = model[0].adapters.default.lora_A, model[0].adapters.default.lora_B
    with torch.no_grad():
        A.copy_(torch.eye(rank, size))
        B.copy_(torch.eye(size, rank))
    x = torch.randn(96, size).bfloat16().requires_grad_()
    g = torch.zeros(96, size, dtype=torch.bfloat16)
    g[7] = torch.randn(size).bfloat16()  # one row: the factors' gradients are products, not sums
    y = model(x)
    y.backward(g)
    xs, gs = x.detach().double(), g.double()
    wanted = {
        "y": (y.detach()[:, :rank], scale * xs[:, :rank], 1),
        "dx": (x.grad[7, :rank], scale * gs[7, :rank], 1),
        "dA": (A.grad, scale * torch.outer(gs[7, :rank], xs[7]), 2),
        "dB": (B.grad, scale * torch.outer(gs[7], xs[7, :rank]), 2),
    }
    for name, (found, exact, roundings) in wanted.items():
        worst = float(((found.double() - exact).abs() / exact.abs()).max())
        assert worst <= 1.02 * roundings * unit, f"{name}: {worst / unit:.2f} units"
