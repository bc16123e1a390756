"""LoRA's products with the frozen layer's: what the tests of all LoRA ops do not say of these.

That bodies are the formulas, that fakes predict them and that lowerings compute them is tested with the other ops.
"""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.ir import dialect
from tests.ir import formulas
from tests.ir.formulas import in_double, leaves, outputs

OPS = ("lora_linear_expand", "lora_bottleneck_grads", "lora_linear_input_grads")


def op(name):
    return dialect.get(name).overload


def split(name, args):
    """The same by the ops that are fused, one after the other."""
    if name == "lora_linear_expand":
        x, right, bias, h, B = args
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ right if bias is None else torch.addmm(bias, rows, right)
        return [op("lora_expand")(y.view(*h.shape[:-1], -1), h, B)]
    if name == "lora_bottleneck_grads":
        grad, h, B, scale, dtype = args
        return [op("lora_bottleneck_grad")(grad, B, scale), op("lora_factor_grad")(grad, h, dtype)]
    grad, right, q, *rest = args
    dx, *others = [g.reshape(-1, g.shape[-1]) @ w for g, w in zip(grad, right, strict=True)]
    for other in others:
        dx = dx + other
    return [op("lora_input_grads")(dx.view(*q[0].shape[:-1], -1), q, *rest)]


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
def test_it_is_not_further_from_the_formula_than_its_parts(name, data):
    args = dialect.get(name).sample(data.draw)
    formula = formulas.FORMULAS[name]
    sizes = outputs(formula(*in_double(args, absolute=True)))
    wants = outputs(formula(*in_double(args)))
    dtype = leaves(args)[0].dtype
    for got, parts, want, size in zip(outputs(op(name)(*args)), split(name, args), wants, sizes, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (parts.shape, parts.stride(), parts.dtype)
        unit = (4 if name == "lora_linear_input_grads" else 1) * torch.finfo(dtype).eps  # a kernel drops in fp32
        errors = [(one.double() - want).abs() for one in (got, parts)]
        assert bool((errors[0] <= 1.1 * errors[1] + unit * size).all())


@pytest.mark.parametrize("name", OPS)
def test_samples_reach_the_cases(name):
    seen = collections.Counter()

    @given(data=st.data())
    def collect(data):
        args = dialect.get(name).sample(data.draw)
        tensors = leaves(args)
        seen.update({t.dtype for t in tensors if t.dtype != torch.int64})
        seen.update({f"{t.dim()}-D" for t in tensors} | ({"strided"} if not tensors[0].is_contiguous() else set()))
        seen.update(["lists of several"] if isinstance(args[0], list) and len(args[0]) > 1 else [])
        seen.update(["no bias" if args[2] is None else "bias"] if name == "lora_linear_expand" else [])
        seen.update(["dropout" if args[4] else "no dropout"] if name == "lora_linear_input_grads" else [])

    collect()
    wanted = {torch.float64, torch.float32, torch.bfloat16, torch.float16, "2-D", "3-D", "strided"}
    more = {OPS[0]: {"bias", "no bias"}, OPS[1]: set(), OPS[2]: {"lists of several", "dropout", "no dropout"}}
    assert wanted | more[name] <= set(seen)


def operands(batch=(2, 3)):
    draw = torch.Generator().manual_seed(1)
    shapes = {"x": (*batch, 7), "W": (7, 5), "b": (5,), "h": (*batch, 3), "A": (3, 7), "B": (5, 3), "g": (*batch, 5)}
    found = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return {**found, "s": torch.tensor([1.5], dtype=torch.float64)}


def calls(o):
    return {
        "lora_linear_expand": (o["x"], o["W"], o["b"], o["h"], o["B"]),
        "lora_bottleneck_grads": (o["g"], o["h"], o["B"], o["s"], torch.float64),
        "lora_linear_input_grads": ([o["g"]], [o["W"].t()], [o["h"]], [o["A"]], [torch.tensor([7])], [0.5]),
    }


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (4,)])
def test_vectors_and_empty_batches(name, batch):
    args = calls(operands(batch))[name]
    for got, want in zip(outputs(op(name)(*args)), outputs(formulas.FORMULAS[name](*args)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPS)
def test_autocast_does_not_change_the_dtype_of_the_computation(name):
    """Of one op all operands are in lists."""
    args = calls({k: v.float() for k, v in operands().items()})[name]
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(op(name)(*args))
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(op(name)(*args)), strict=True))


def test_costs_are_the_frozen_products_and_the_adapters():
    args = calls({k: v.float() for k, v in operands().items()})
    m, k, n, r = 6, 7, 5, 3
    expand, grads, inputs = (dialect.get(name).cost(*args[name]) for name in OPS)
    assert expand.flops == m * n * (2 * k + 1) + 2 * m * r * n + m * n
    assert (expand.read, expand.written) == (4 * (m * k + k * n + n + m * r + n * r), 4 * m * n)
    assert grads.flops == 2 * m * n * r + m * r + 2 * m * n * r
    # The gradient of the output is read once.
    assert (grads.read, grads.written) == (4 * (m * n + m * r + n * r), 4 * m * r + 8 * n * r)
    parts = dialect.get("lora_input_grads").cost(torch.empty(2, 3, k), *args[OPS[2]][2:])
    assert inputs.flops == 2 * m * n * k + parts.flops
    assert (inputs.read, inputs.written) == (4 * (m * n + n * k + m * r + r * k), 4 * m * k)
    two = dialect.get(OPS[2]).cost(*([one * 2 for one in args[OPS[2]][:2]]), *args[OPS[2]][2:])
    assert two.flops - inputs.flops == 2 * m * n * k + m * k
