"""Hydra on a real class and by itself: its formula, its merged form, its gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import PlanError
from adaptc.ir import dialect
from tests.methods.in_fp64 import check_against_formula, randomise
from tests.models import hosts
from tests.reference import check_all_rewritten

TARGETS = ["re:.*layer\\.\\d+\\.output\\.dense"]


def after(tensors, module, x, y):
    total = y
    for name, value in (("parallel", x), ("sequential", y)):
        if f"{name}_A" not in tensors:
            continue
        inner = value @ tensors[f"{name}_A"].T + tensors.get(f"{name}_A_bias", 0)
        total = total + tensors["scale"] * (inner @ tensors[f"{name}_B"].T + tensors.get(f"{name}_B_bias", 0))
    return total


@pytest.mark.parametrize("options", [{"r": 3, "r_sequential": 2}, {"r": 2, "bias": False}, {"r": 0, "r_sequential": 2}])
def test_computes_the_formula(options):
    base = hosts.build("bert", train=True)
    hydra = adaptc.Hydra(scale=0.4, targets=TARGETS, **options)
    model = adaptc.compile(copy.deepcopy(base), hydra, backend="aot_eager")
    randomise(model, size=0.1)
    check_against_formula(model, base, hosts.batch("bert"), after=after)
    check_all_rewritten(model, 2)


def layer(bias=True):
    return nn.Sequential(nn.Linear(7, 5, bias=bias)).double()


def adapted(base, **options):
    hydra = adaptc.Hydra(**{"r": 3, "r_sequential": 2, "scale": 0.7, "targets": "0", **options})
    # The masks are torch's own, drawn in the order of the calls.
    plan = adaptc.Plan([hydra], passes={"skip": ["seed_dropout"]})
    model = adaptc.compile(copy.deepcopy(base), plan, backend="eager")
    randomise(model)
    return model, model.adaptc.sites[0].adapters["default"]


@pytest.mark.parametrize("init", ["xavier", "kaiming", "normal"])
def test_zero_heads_are_the_base(init):
    base = layer()
    hydra = adaptc.Hydra(init=init, targets="0")
    model = adaptc.compile(copy.deepcopy(base), hydra, backend="eager")
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(model(x), base(x))
    for name, p in model.adaptc.named_parameters():
        assert bool(p.any()) == name.endswith("_A"), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"r": 0}, {"r_sequential": 0}, {"bias": False}])
def test_the_layer_can_take_it_up(bias, options):
    base = layer(bias)
    model, adapter = adapted(base, **options)
    x = torch.randn(4, 7, dtype=torch.float64)
    weight = base[0].weight + adapter.delta(base[0].weight)
    added = adapter.delta_bias(base[0].bias)
    merged = nn.functional.linear(x, weight) + added + (base[0].bias if bias else 0)
    torch.testing.assert_close(model(x), merged, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(adapter.delta(base[0].weight)) <= sum(adapter.method.ranks)


def test_it_is_the_lora_of_both_heads_on_this_weight():
    base = layer()
    _, a = adapted(base, bias=False)
    A = torch.cat([a.parallel_A, a.sequential_A @ base[0].weight])
    B = torch.cat([a.parallel_B, a.sequential_B], 1)
    torch.testing.assert_close(a.delta(base[0].weight), 0.7 * B @ A)


def test_gradient_passes_the_sequential_head_before_the_weight():
    """dx = g' W + s g B_p A_p with g' = g + s (g B_s) A_s."""
    base = layer()
    model, a = adapted(base)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 5, dtype=torch.float64)
    model(x).backward(g)
    with torch.no_grad():
        through = g + 0.7 * (g @ a.sequential_B) @ a.sequential_A
        want = through @ base[0].weight + 0.7 * (g @ a.parallel_B) @ a.parallel_A
    torch.testing.assert_close(x.grad, want)
    assert model[0].weight.grad is None and model[0].bias.grad is None


def test_dropout_sits_between_the_factors():
    base = layer()
    model, a = adapted(base, dropout=0.5)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.manual_seed(1)
    got = model.train()(x)
    torch.manual_seed(1)
    masks = [nn.functional.dropout(torch.ones(4, r, dtype=torch.float64), 0.5) for r in (3, 2)]
    h = base(x)
    parallel = (x @ a.parallel_A.T + a.parallel_A_bias) * masks[0]
    sequential = (h @ a.sequential_A.T + a.sequential_A_bias) * masks[1]
    outer = parallel @ a.parallel_B.T + a.parallel_B_bias + sequential @ a.sequential_B.T + a.sequential_B_bias
    want = h + 0.7 * outer
    torch.testing.assert_close(got, want)
    assert any(0 in mask for mask in masks) and not torch.equal(model.eval()(x), got)


@given(data=st.data())
@settings(max_examples=50)
def test_op_computes_the_formula(data):
    args = dialect.get("hydra_heads").sample(data.draw)
    x, h, A_p, a_p, B_p, b_p, A_s, a_s, B_s, b_s, scale, mask_p, mask_s = (
        None if a is None else a.double() for a in args
    )
    want = h.clone()
    for value, A, a, B, b, mask in ((x, A_p, a_p, B_p, b_p, mask_p), (h, A_s, a_s, B_s, b_s, mask_s)):
        if A is not None:
            inner = (value @ A.T + (0 if a is None else a)) * (1 if mask is None else mask)
            want = want + scale * (inner @ B.T + (0 if b is None else b))
    got = dialect.get("hydra_heads").overload(*args)
    eps = torch.finfo(got.dtype).eps
    # Values are at most 2, sizes at most 6: a head's products stay below 6 * 6 * 2^5 before the last sum.
    assert float((got.double() - want).abs().max()) <= 4 * eps * 1200
    assert got.dtype == args[1].dtype and got.shape == args[1].shape


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "ranks of at least 0, not both 0"),
        ({"r": -1, "r_sequential": 2}, "ranks of at least 0"),
        ({"dropout": 1.0}, "dropout is not legal"),
        ({"scale": float("inf")}, "scale is not legal"),
        ({"init": "zeros"}, "init is not legal"),
    ],
)
def test_illegal_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        adaptc.Hydra(**options)
