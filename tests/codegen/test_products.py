"""Which kernels torch calls for the dialect's products on a CPU, once they are there, and that no Python is between."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from adaptc.codegen import in_place
from adaptc.codegen.cpp import pairs, products, skinny
from adaptc.codegen.torch_internals import cpu_emulates
from adaptc.ir import dialect

ONE, SEEDS, P = torch.ones(1, dtype=torch.float64), [torch.tensor([5])], [0.5]


def calls(dtype, rank):
    """Op -> (the kernel's name, what it drops)(arguments) -> the op called."""
    x, q, A = torch.randn(2, 30, 40).to(dtype), torch.randn(2, 30, rank).to(dtype), torch.randn(rank, 40).to(dtype)
    lowered = torch.ops.adaptc_lowered
    return {
        ("shrink", False): lambda: dialect.get("lora_shrink").overload(x, [A], [ONE], [], []),
        ("shrink", True): lambda: dialect.get("lora_shrink").overload(x, [A], [ONE], SEEDS, P),
        ("gradient", False): lambda: dialect.get("lora_factor_grads").overload([q], x, dtype, [], []),
        ("gradient", True): lambda: dialect.get("lora_factor_grads").overload([q], x, dtype, SEEDS, P),
        ("both", False): lambda: dialect.get("lora_bottleneck_grads").overload(x, q, A.t(), ONE, dtype),
        ("update", False): lambda: lowered.add_products_(x.clone(), [q], [A], [], []),
        ("update", True): lambda: lowered.add_products_(x.clone(), [q], [A], SEEDS, P),
        ("update", None): lambda: lowered.add_product_(x.clone().view(60, 40), q.view(60, rank), A),
    }


def expected(dtype, rank, drops):
    """The library that ``adaptc.codegen.cpp.products`` says, or None for Python."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    if drops:
        return "adaptc_skinny"
    few = rank <= products.MOST_RANKS
    if dtype == torch.float32:
        return "adaptc_skinny" if few else None
    if few and pairs.library() is not None:
        return "adaptc_pairs"
    return "adaptc_skinny" if cpu_emulates(dtype) and few else None


@pytest.mark.parametrize("rank", [3, products.MOST_RANKS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_op_goes_where_the_table_says(dtype, rank):
    assert skinny.library() is not None
    pairs.library()
    assert in_place.ADD_PRODUCT is not None  # its import defines the ops in place
    for (kernel, drops), call in calls(dtype, rank).items():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            call()
        names = {event.key for event in seen.key_averages() if "::" in event.key}
        library = expected(dtype, rank, bool(drops))
        if dtype == torch.bfloat16 and cpu_emulates(dtype) and kernel != "both":
            library = "adaptc_skinny"
        made = {name for name in names if name.startswith(("adaptc_skinny", "adaptc_pairs"))}
        assert made == (set() if library is None else {f"{library}::{kernel}"}), (kernel, drops)
        in_python = any(name.startswith("adaptc_python") for name in names)
        assert in_python == (library is None), (kernel, drops, names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_give_what_python_gives(dtype):
    """The first call, in Python, and every later one call the same kernels."""
    assert skinny.library() is not None
    x, q, A = torch.randn(2, 30, 40).to(dtype), torch.randn(2, 30, 3).to(dtype), torch.randn(3, 40)
    for seeds, p in ((SEEDS, P), ([], [])):
        for name, args in {
            "lora_shrink": (x, [A], [ONE], seeds, p),
            "lora_factor_grads": ([q], x, torch.float32, seeds, p),
            "lora_bottleneck_grads": (x, q, A.t(), ONE, torch.float32),
        }.items():
            got = getattr(torch.ops.adaptc, name)(*args)
            want = getattr(torch.ops.adaptc_python, name)(*args)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)), name


def test_parameters_and_their_grad_mode_do_not_matter():
    """As parts of a backward they have no gradients, whatever their arguments ask for."""
    x, A = torch.randn(4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(2, 8))
    h = torch.ops.adaptc.lora_shrink(x, [A], [ONE], SEEDS, P)[0]
    want = torch.ops.adaptc.lora_shrink(x.detach(), [A.detach()], [ONE], SEEDS, P)[0]
    assert torch.equal(h.detach(), want)
