"""library: a frozen layer's product by the library that was faster for its shape."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.codegen import choices
from adaptc.codegen.choices import Choice
from adaptc.codegen.cost import shares
from adaptc.ir.edit import copy_graph_module
from adaptc.ir.ops.onednn_linear import ONEDNN_LINEAR
from adaptc.ir.sites import is_inserted
from adaptc.passes import library
from adaptc.passes.contract import Context
from adaptc.torch_internals import mark_recomputed
from tests.passes.models import Model, adapted, trained_graph

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])

aten = torch.ops.aten
SLOWER, FASTER = {"MKL": 1.0, "oneDNN": 1.5}, {"MKL": 1.0, "oneDNN": 0.5}


@pytest.fixture
def timed(monkeypatch):
    """Sets what timing says, and which shapes are worth it; the questions that were asked."""
    asked = []

    def set_times(seconds, worth=1):
        def choose(question, make):
            asked.append(question)
            return Choice(question, seconds)

        monkeypatch.setattr(choices, "choose", choose)
        monkeypatch.setattr(library, "WORTH", worth)
        return asked

    return set_times


def lowered_graph(dtype=torch.float32, **options):
    _, model = adapted(dtype=dtype, passes={"skip": ["library"]}, **options)
    return copy_graph_module(trained_graph(model, dtype=dtype).graph_module("lower"))


def frozen_products(gm):
    return [n for n in gm.graph.nodes if n.target in (aten.mm.default, aten.addmm.default) and not is_inserted(n)]


def test_every_product_of_a_frozen_layer(timed):
    asked = timed(FASTER)
    gm = lowered_graph()
    # up, down and the score, and two gradients: nothing asks for that of the input.
    assert len(frozen_products(gm)) == 5
    context = Context()
    result = library.library(gm, context)
    gm.graph.lint()
    assert (len(result.applied), result.refused) == (5, [])
    assert not frozen_products(gm) and len(gm.graph.find_nodes(op="call_function", target=ONEDNN_LINEAR.overload)) == 5
    # 14 rows; the weight as it is in the forward, and transposed in the backward.
    assert sorted(asked) == sorted([
        "product 16 x 6 x 10, bias, float32", "product 16 x 10 x 6, float32", "product 16 x 6 x 3, bias, float32",
        "product 16 x 3 x 6 transposed, float32", "product 16 x 6 x 10 transposed, float32",
    ])  # fmt: skip
    assert [choice.chosen for choice in context.choices] == ["oneDNN"] * 5


def test_where_mkl_is_faster_it_stays(timed):
    timed(SLOWER)
    gm, context = lowered_graph(), Context()
    assert library.library(gm, context).applied == [] and len(frozen_products(gm)) == 5
    assert [choice.chosen for choice in context.choices] == ["MKL"] * 5


def test_small_products_are_not_asked_for(timed):
    asked = timed(FASTER, worth=library.WORTH)
    assert library.library(lowered_graph(), Context()).applied == [] and asked == []


@pytest.mark.parametrize("most, rows", [(library.MOST, 256), (100 * 60, 128), (1, 128)])
def test_large_products_are_asked_for_with_fewer_rows(most, rows, timed, monkeypatch):
    asked = timed(SLOWER)
    monkeypatch.setattr(library, "MOST", most)
    _, model = adapted(passes={"skip": ["library"]})
    gm = copy_graph_module(trained_graph(model, rows=(30, 7)).graph_module("lower"))
    library.library(gm, Context())
    assert f"product {rows} x 10 x 6, float32" in asked
    monkeypatch.setattr(library, "LARGEST", 59)
    asked.clear()
    library.library(gm, Context())
    assert asked and not any("6 x 10" in one or "10 x 6" in one for one in asked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_not_asked_for(dtype, timed):
    asked = timed(FASTER)
    assert library.library(lowered_graph(dtype), Context()).applied == [] and asked == []


def test_what_it_writes_is_the_base_models(timed):
    """What adapters cost, and what a checkpoint drops, is as it was."""
    timed(FASTER)
    gm = lowered_graph()
    before = shares(gm)
    for node in frozen_products(gm):
        mark_recomputed(node)
    library.library(gm, Context())
    after, calls = shares(gm), gm.graph.find_nodes(op="call_function", target=ONEDNN_LINEAR.overload)
    for phase, share in before.items():
        assert (after[phase].adapters, after[phase].base.flops) == (share.adapters, share.base.flops)
    assert len(calls) == 5 and all("recompute" in node.meta and "ac_graph_id" in node.meta for node in calls)


SWITCHES = {
    "oneDNN is off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "freezing": lambda: torch._inductor.config.patch(freezing=True),
    "max_autotune": lambda: torch._inductor.config.patch(max_autotune=True),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_where_others_choose_it_does_not(name, timed):
    asked = timed(FASTER)
    gm = lowered_graph()
    with SWITCHES[name]():
        assert library.library(gm, Context()).applied == [] and asked == []


def test_what_runs_deterministically_does_not_depend_on_timing(monkeypatch, tmp_path):
    monkeypatch.setattr(choices.torch_internals, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(choices._MEMORY, "known", {})
    monkeypatch.setattr(library, "WORTH", 1)
    context = Context()
    torch.use_deterministic_algorithms(True)
    try:
        assert library.library(lowered_graph(), context).applied == []
    finally:
        torch.use_deterministic_algorithms(False)
    assert context.choices == [] and not list(tmp_path.rglob("*.json"))
    library.library(lowered_graph(), context)
    assert len(context.choices) == 5 and len(list(tmp_path.rglob("*.json"))) == 1


def test_a_limit_is_kept(timed):
    timed(FASTER)
    gm = lowered_graph()
    result = library.library(gm, Context(budget=2))
    assert {layer for layer, _ in result.refused} <= {"score", "layers.0.up", "layers.0.down"}
    assert (len(result.applied), len(result.refused)) == (2, 3) and len(frozen_products(gm)) == 3


def test_both_ways_are_timed_and_compute_the_same(monkeypatch, tmp_path):
    """What is timed is what runs: the products of the question, each by its library."""
    monkeypatch.setattr(library, "WORTH", 1)
    monkeypatch.setattr(choices.torch_internals, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(choices._MEMORY, "known", {})
    monkeypatch.setattr(torch, "ones", lambda *size, **options: torch.rand(*size, **options) + 0.5)
    seen = []

    def time(ways):
        seen.append({way: run() for way, run in ways.items()})
        return FASTER

    monkeypatch.setattr(choices, "_time", time)
    _, model = adapted()
    trained_graph(model)
    assert len(seen) == 5 and all(list(one) == ["MKL", "oneDNN"] for one in seen)
    for one in seen:
        assert type(one["MKL"]) is torch.Tensor  # computed, and not traced
        torch.testing.assert_close(one["MKL"], one["oneDNN"])


def test_what_is_timed_is_fp32_on_the_cpu_whatever_the_defaults(timed, monkeypatch):
    timed(SLOWER)
    makes = []
    monkeypatch.setattr(choices, "choose", lambda question, make: makes.append(make))
    library.library(lowered_graph(), Context())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = [run() for make in makes for run in make().values()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(results) == 10 and {(y.dtype, y.device.type) for y in results} == {(torch.float32, "cpu")}


def step(base, x, values=None, **options):
    """(model, loss and gradients), with the adapters' ``values`` if given."""
    method = adaptc.LoRA(r=4, alpha=8, init="random", targets=["up", "down"])
    model = adaptc.compile(copy.deepcopy(base), method, **options)
    for parameter, value in zip(model.adaptc.parameters(), values or (), strict=values is not None):
        parameter.data.copy_(value)
    loss = model(x).square().mean()
    loss.backward()
    return model, [loss.detach(), *(p.grad for p in model.adaptc.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_step_is_that_of_fp64(backend, timed):
    """Loss and gradients of two blocks; under aot_eager every rewrite is checked in fp64 as well."""
    torch.manual_seed(0)
    base, x = Model(depth=2), torch.randn(2, 7, 6)
    timed(FASTER)
    model, got = step(base, x, backend=backend, verify="raise" if backend == "aot_eager" else False)
    values = [p.detach() for p in model.adaptc.parameters()]
    _, exact = step(copy.deepcopy(base).double(), x.double(), values, backend="eager")
    (graph,) = model.adaptc.graphs
    assert len({r.name: r for r in graph.reports}["library"].result.applied) == 9
    for one, want in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), want, rtol=2e-5, atol=1e-6)
    assert "oneDNN, 500 ms; MKL takes 2.00 times as long (" in str(model.adaptc.explain())
    if backend == "inductor":  # adapters add to what oneDNN made, where it is
        assert graph.in_place >= 4


@given(st.data())
def test_the_op_is_the_formula(data):
    x, weight, bias = ONEDNN_LINEAR.sample(data.draw)
    got = ONEDNN_LINEAR.overload(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    body = ONEDNN_LINEAR.body(x, weight, bias)
    size = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    error = 1.1 * (body.double() - exact).abs() + 2 * torch.finfo(x.dtype).eps * size
    assert (got.shape, got.dtype, got.is_contiguous()) == (exact.shape, x.dtype, True)
    assert bool(((got.double() - exact).abs() <= error).all())
    faked = ONEDNN_LINEAR.fake(x, weight, bias)
    assert (faked.shape, faked.dtype, faked.stride()) == (got.shape, got.dtype, got.stride())
