"""Which kernels torch calls for the dialect's products on a CPU, once they are there, and that no Python is between."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import adaptc
from adaptc.codegen.cpp import pairs, skinny
from adaptc.codegen.cpp.takes import FEWEST_ROWS, MOST_RANKS
from adaptc.codegen.ops.in_place import ADD_PRODUCT
from adaptc.torch_internals import cpu_emulates
from tests.reference import check_steps_agree, step

ONE, SEEDS, P = torch.ones(1, dtype=torch.float64), [torch.tensor([5])], [0.5]


def cases(dtype, rank, rows):
    """(what is done, whether it drops) -> the call of the op, and of a library's kernel."""
    x, q = (torch.randn(2, rows // 2, width).to(dtype) for width in (40, rank))
    A = torch.randn(rank, 40).to(dtype)
    ops, lowered = torch.ops.adaptc, torch.ops.adaptc_lowered

    def in_place(update, *rest):
        total = x.clone()
        update(total, *rest)
        return [total]

    found = {("both", False): (lambda: ops.lora_bottleneck_grads(x, q, A.t(), ONE, dtype),
                               lambda kernels: kernels.both(x, q, A.t(), ONE, dtype)),
             ("update one", False): (lambda: in_place(lowered.add_product_, q, A),
                                     lambda kernels: in_place(kernels.update, [q], [A], [], []))}  # fmt: skip
    for seeds, p in (([], []), (SEEDS, P)):
        given = seeds, p
        found |= {
            ("shrink", bool(seeds)): (
                lambda given=given: ops.lora_shrink(x, [A], [ONE], *given),
                lambda kernels, given=given: kernels.shrink(x, [A], [ONE], *given),
            ),
            ("gradient", bool(seeds)): (
                lambda given=given: ops.lora_factor_grads([q], x, dtype, *given),
                lambda kernels, given=given: kernels.gradient([q], x, dtype, *given),
            ),
            ("update", bool(seeds)): (
                lambda given=given: in_place(lowered.add_products_, [q], [A], *given),
                lambda kernels, given=given: in_place(kernels.update, [q], [A], *given),
            ),
        }
    return found


def expected(dtype, rank, rows, what, drops):
    """The library that ``adaptc.codegen.cpp.products`` says, or None for Python."""
    if dtype not in skinny.DTYPES:
        return None
    if drops:
        return skinny.library()
    few = rank <= MOST_RANKS
    if dtype == torch.float32:
        return skinny.library() if few and rows >= FEWEST_ROWS else None
    if few and pairs.library() is not None:
        return pairs.library()
    return skinny.library() if cpu_emulates(dtype) and (few or what != "both") else None


@pytest.mark.parametrize("rows", [FEWEST_ROWS - 2, FEWEST_ROWS])
@pytest.mark.parametrize("rank", [3, MOST_RANKS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_op_goes_where_the_table_says(dtype, rank, rows):
    """Without Python between, and with the bits of the kernel."""
    assert skinny.library() is not None
    pairs.library()
    assert ADD_PRODUCT is not None  # its import defines the ops in place
    for (what, drops), (call, kernel) in cases(dtype, rank, rows).items():
        library = expected(dtype, rank, rows, what, drops)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            got = call()
        in_python = any(event.key.startswith("adaptc_python::") for event in seen.key_averages())
        assert in_python == (library is None), (what, drops)
        if library is not None:
            assert all(map(torch.equal, got, kernel(library))), (what, drops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_give_what_python_gives(dtype):
    """The first call, in Python, and every later one call the same kernels."""
    assert skinny.library() is not None
    x, q, A = torch.randn(2, 70, 40).to(dtype), torch.randn(2, 70, 3).to(dtype), torch.randn(3, 40)
    for seeds, p in ((SEEDS, P), ([], [])):
        for name, args in {
            "lora_shrink": (x, [A], [ONE], seeds, p),
            "lora_factor_grads": ([q], x, torch.float32, seeds, p),
            "lora_bottleneck_grads": (x, q, A.t(), ONE, torch.float32),
        }.items():
            got = getattr(torch.ops.adaptc, name)(*args)
            want = getattr(torch.ops.adaptc_python, name)(*args)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)), name


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), rows=st.integers(FEWEST_ROWS - 3, FEWEST_ROWS + 3),
    ranks=st.lists(st.integers(1, MOST_RANKS + 1), min_size=1, max_size=3), drops=st.booleans(),
)  # fmt: skip
@settings(max_examples=50)
def test_cpp_and_python_choose_alike(dtype, rows, ranks, drops):
    """Each kernel, and the library of torch, rounds in its own way."""
    assert skinny.library() is not None
    x, A = torch.randn(rows, 40).to(dtype), [torch.randn(rank, 40).to(dtype) for rank in ranks]
    count = len(ranks) if drops else 0
    args = x, A, [ONE] * len(ranks), SEEDS * count, P * count
    got, want = torch.ops.adaptc.lora_shrink(*args), torch.ops.adaptc_python.lora_shrink(*args)
    assert all(map(torch.equal, got, want))


def test_arguments_that_require_gradients_give_the_same_numbers():
    x, A = torch.randn(4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(2, 8))
    h = torch.ops.adaptc.lora_shrink(x, [A], [ONE], SEEDS, P)[0]
    want = torch.ops.adaptc.lora_shrink(x.detach(), [A.detach()], [ONE], SEEDS, P)[0]
    assert torch.equal(h.detach(), want)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_models_step_is_that_of_the_bodies_in_fp64(p):
    """With the tokens that fp32 kernels are for and with fewer, in one graph of symbolic sizes."""
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101,
    )  # fmt: skip
    torch.manual_seed(0)
    base, values = transformers.LlamaForCausalLM(config), torch.Generator().manual_seed(2)
    drawn: dict[str, torch.Tensor] = {}
    steps = []
    for dtype in (torch.float64, torch.float32):
        lora = adaptc.LoRA(r=5, alpha=8, dropout=p, init="random", targets="all-linear")
        model = adaptc.compile(copy.deepcopy(base).to(dtype), lora, backend="inductor", dynamic=True).train()
        for name, parameter in model.adaptc.named_parameters():
            if name not in drawn:
                drawn[name] = 0.1 * torch.randn(parameter.shape, generator=values)
            parameter.data.copy_(drawn[name])
        for tokens in (100, 3, 70):
            ids = torch.randint(0, 101, (2, tokens), generator=torch.Generator().manual_seed(tokens))
            torch.manual_seed(5)
            steps.append(step(model, {"input_ids": ids, "labels": ids, "use_cache": False}))
            model.zero_grad()
    for exact, got in zip(steps[:3], steps[3:], strict=True):
        check_steps_agree(got, exact, loss=1e-6, gradient=1e-5)
