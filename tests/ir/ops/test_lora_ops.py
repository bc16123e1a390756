"""Each LoRA op against its formula in fp64, forward and backward."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.errors import UnsupportedError
from adaptc.ir import dialect
from tests.ir import formulas
from tests.ir.formulas import assert_within, in_double, leaves, outputs, rounding_bound

OPS = tuple(formulas.FORMULAS)
INPUTS = ("x", "y", "A", "B", "scale")


def small(dtype=torch.float64, batch=(2, 3), scale=(1,)):
    """x, y, A, B, scale with sizes that differ from each other."""
    draw = torch.Generator().manual_seed(5)
    shapes = ((*batch, 7), (*batch, 5), (3, 7), (5, 3), scale)
    return [torch.rand(s, generator=draw, dtype=torch.float64).mul_(2).sub_(1).to(dtype) for s in shapes]


def linear(*args):
    return dialect.get("lora_linear").overload(*args)


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
def test_body_is_the_formula(name, data):
    op = dialect.get(name)
    args = op.sample(data.draw)
    formula = formulas.FORMULAS[name]
    wants, magnitudes = outputs(formula(*in_double(args))), outputs(formula(*in_double(args, absolute=True)))
    for got, want, magnitude in zip(outputs(op.overload(*args)), wants, magnitudes, strict=True):
        assert_within(got, want, rounding_bound(magnitude, args, leaves(args)[0].dtype), name)


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
def test_fake_predicts_shape_stride_and_dtype(name, data):
    op = dialect.get(name)
    args = op.sample(data.draw)
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), list(args))
    for got, want in zip(outputs(op.fake(*meta)), outputs(op.body(*args)), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_samples_reach_the_cases_that_break_lazy_code():
    seen = collections.Counter()

    @given(data=st.data())
    def collect(data):
        x, y, A, B, scale, scale_at = dialect.get("lora_linear").sample(data.draw)
        seen.update([x.dtype, scale_at, f"{x.dim()}-D", f"scale{next(iter(scale.shape)) > 1}"])
        seen.update(["cast"] if A.dtype != x.dtype else [])
        seen.update(f"strided {n}" for n, t in zip(INPUTS, (x, y, A, B), strict=False) if not t.is_contiguous())
        seen.update(["rectangular"] if len({x.shape[-1], y.shape[-1], A.shape[0]}) == 3 else [])

    collect()
    wanted = {torch.float64, torch.float32, torch.bfloat16, torch.float16, "n", "r", "2-D", "3-D", "cast"}
    wanted |= {"strided x", "strided y", "strided A", "strided B", "scaleTrue", "scaleFalse", "rectangular"}
    assert wanted <= set(seen)


@given(data=st.data())
def test_gradient_is_the_derivative_of_the_formula(data):
    *tensors, scale_at = dialect.get("lora_linear").sample(data.draw)
    trainable = [n for n in INPUTS if n != "scale" or scale_at == "n"]
    needed = data.draw(st.sets(st.sampled_from(trainable), min_size=1), label="requires_grad")
    dtype = tensors[0].dtype
    for name, tensor in zip(INPUTS, tensors, strict=True):
        tensor.requires_grad_(name in needed)
    out, _ = linear(*tensors, scale_at)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(dtype)
    out.backward(grad)

    def derivative(absolute):
        doubles = [t.requires_grad_() for t in in_double(tensors, absolute=absolute)]
        (g,) = in_double([grad], absolute=absolute)
        return torch.autograd.grad(formulas.lora_linear(*doubles, scale_at)[0], doubles, g)

    everything = [*tensors, grad]
    for name, tensor, want, magnitude in zip(INPUTS, tensors, derivative(False), derivative(True), strict=True):
        if name not in needed:
            assert tensor.grad is None, name
            continue
        assert tensor.grad.dtype == tensor.dtype
        assert_within(tensor.grad, want, rounding_bound(magnitude, everything, dtype), f"gradient of {name}")


@pytest.mark.parametrize("scale_at, scale", [("n", (1,)), ("r", (1,)), ("r", (3,))])
def test_first_and_second_derivatives_by_differences(scale_at, scale):
    *operands, s = small(scale=scale)
    inputs = [t.requires_grad_() for t in (*operands, s)]
    inputs[4].requires_grad_(scale_at == "n")

    def output(*args):
        return linear(*args, scale_at)[0]

    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


def test_trained_scale_is_refused_at_the_bottleneck():
    x, y, A, B, scale = small()
    with pytest.raises(UnsupportedError, match="a trained scale cannot be folded into the bottleneck"):
        linear(x, y, A, B, scale.requires_grad_(), "r")


def test_trained_scale_of_zero_has_a_gradient():
    x, y, A, B, _ = small()
    scale = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    linear(x, y, A, B, scale, "n")[0].sum().backward()
    torch.testing.assert_close(scale.grad, torch.einsum("...k,rk,nr->", x, A, B).reshape(1))
    assert scale.grad.abs() > 0.1


@pytest.mark.parametrize("rank", [3, 5], ids=["r", "r-equals-n"])
def test_a_scale_per_rank_is_refused_at_the_output(rank):
    x, y, _, _, _ = small()
    A, B, scale = torch.ones(rank, 7), torch.ones(5, rank), torch.ones(rank)
    with pytest.raises(UnsupportedError, match="a scale per rank multiplies the bottleneck"):
        linear(x.float(), y.float(), A, B, scale, "n")


def test_an_unknown_place_for_the_scale_is_refused():
    with pytest.raises(UnsupportedError, match=r"scale_at is not legal\n.*\n  found     'm'"):
        linear(*small(), "m")


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
@settings(max_examples=8)
def test_torchs_own_checks_of_a_custom_op(name, data):
    op = dialect.get(name)
    args = list(op.sample(data.draw))
    if op.gradient is not None:
        trained = {"n": 5, "r": 4}[args[5]]
        args = [a.requires_grad_() if i < trained else a for i, a in enumerate(args)]
    torch.library.opcheck(op.overload, args)


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "needed, expected",
    [
        ("A", {"lora_bottleneck_grad": 1, "lora_factor_grad": 1}),
        ("B", {"lora_factor_grad": 1}),
        ("AB", {"lora_bottleneck_grad": 1, "lora_factor_grad": 2}),
        ("x", {"lora_bottleneck_grad": 1, "lora_input_grad": 1}),
        ("xAB", {"lora_bottleneck_grad": 1, "lora_factor_grad": 2, "lora_input_grad": 1}),
        ("y", {}),
    ],
)
@pytest.mark.parametrize("scale_at", ["n", "r"])
def test_backward_computes_only_what_is_needed(needed, expected, scale_at):
    tensors = dict(zip(INPUTS, small(), strict=True))
    for name in needed:
        tensors[name].requires_grad_()
    out, _ = linear(*tensors.values(), scale_at)
    with CountOps() as count:
        out.sum().backward()
    assert {k: v for k, v in count.calls.items() if k.startswith("lora_")} == expected
    assert [n for n, t in tensors.items() if t.grad is not None] == [n for n in INPUTS if n in needed]


def test_the_bottleneck_is_not_differentiable():
    x, y, A, B, scale = small()
    _, h = linear(x, y, A.requires_grad_(), B, scale, "n")
    assert not h.requires_grad


@pytest.mark.parametrize("scale_at", ["n", "r"])
def test_fp32_factors_on_a_bf16_input_get_fp32_gradients(scale_at):
    x, y, A, B, scale = small(torch.bfloat16)
    A, B = A.float().requires_grad_(), B.float().requires_grad_()
    out, h = linear(x, y, A, B, scale.double(), scale_at)
    assert (out.dtype, h.dtype) == (torch.bfloat16, torch.bfloat16)
    out.sum().backward()
    assert (A.grad.dtype, B.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
@pytest.mark.parametrize("scale_at", ["n", "r"])
def test_vectors_and_empty_batches(batch, scale_at):
    tensors = small(batch=batch)
    out, h = linear(*[t.requires_grad_(i < 4) for i, t in enumerate(tensors)], scale_at)
    want = formulas.lora_linear(*tensors, scale_at)
    torch.testing.assert_close((out, h), want)
    assert h.shape == (*batch, 3)
    got = torch.autograd.grad(out.sum(), tensors[:4])
    torch.testing.assert_close(got, torch.autograd.grad(want[0].sum(), tensors[:4]))


def test_autocast_does_not_change_the_dtype_of_the_computation():
    x, y, A, B, scale = small(torch.float32)
    want = linear(x, y, A, B, scale, "r")
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(x, y, A, B, scale, "r")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_cost_of_one_site_in_closed_form():
    x, y, A, B, scale = small(torch.float32)
    m, k, n, r = 6, 7, 5, 3
    cost = dialect.get("lora_linear").cost
    at_r, at_n = cost(x, y, A, B, scale, "r"), cost(x, y, A, B, scale, "n")
    assert at_r.flops == 2 * m * r * (k + n) + m * r + m * n
    assert at_n.flops == 2 * m * r * (k + n) + m * n + m * n
    assert at_r.saved == at_n.saved == 4 * m * r
    assert at_r.written == 4 * (m * n + m * r)
    assert at_n.read + at_n.written == at_r.read + at_r.written + 4 * 4 * m * n
    total = dialect.get("lora_factor_grad").cost(x, y, torch.float32) + at_r
    assert total.flops == 2 * m * k * n + at_r.flops
