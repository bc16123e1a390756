"""widen: on a CPU that emulates a 16-bit dtype, an adapter's products in that dtype are made in fp32."""

from __future__ import annotations

import collections
import copy

import pytest
import torch

import adaptc
from adaptc.codegen.cost import saved_bytes
from adaptc.codegen.cpp import takes
from adaptc.codegen.ops import lora_split
from adaptc.ir.edit import copy_graph_module
from adaptc.ir.sites import is_inserted
from adaptc.passes import widen
from adaptc.passes.contract import Context
from adaptc.torch_internals import cpu_emulates
from tests.passes.models import Model, adapted, trained_graph

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The CPU that runs the tests, as one that has no 16-bit products."""
    for module in (takes, lora_split, widen):
        monkeypatch.setattr(module, "cpu_emulates", lambda dtype: dtype in HALF)
    monkeypatch.setattr(takes, "has_avx512_bf16", lambda: False)


def lowered_graph(dtype, **options):
    _, model = adapted(dtype=dtype, passes={"skip": ["widen"]}, **options)
    return copy_graph_module(trained_graph(model, dtype=dtype).graph_module("lower"))


def product_dtypes(gm):
    """(an adapter's, dtype of the operands) of every product -> how many there are."""
    products = [n for n in gm.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]
    return collections.Counter((is_inserted(n), n.args[0].meta["val"].dtype) for n in products)


@pytest.mark.parametrize("dtype", HALF)
def test_the_products_of_adapters_and_no_others(dtype):
    gm = lowered_graph(dtype)
    before = product_dtypes(gm)
    # Two sites: h, y', q, dA, dB of both and dx of the second; nothing asks for the first one's.
    assert before[True, dtype] == 11 and before[True, torch.float32] == 0
    result = widen.widen(gm, Context())
    gm.graph.lint()
    assert (len(result.applied), result.refused) == (11, [])
    assert product_dtypes(gm) == {(True, torch.float32): 11, (False, dtype): before[False, dtype]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_stay_as_they_are(dtype):
    assert widen.widen(lowered_graph(dtype), Context()).applied == []


def test_nothing_is_done_where_the_cpu_has_the_instructions(monkeypatch):
    gm = lowered_graph(torch.bfloat16)
    monkeypatch.setattr(widen, "cpu_emulates", lambda dtype: False)
    assert widen.widen(gm, Context()).applied == []


def test_a_limit_is_kept():
    gm = lowered_graph(torch.bfloat16)
    result = widen.widen(gm, Context(budget=3))
    assert (len(result.applied), len(result.refused)) == (3, 8)
    assert {reason for _, reason in result.refused} == {"limit reached"}
    assert product_dtypes(gm)[True, torch.float32] == 3


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_step_is_as_near_to_fp64_as_without(dora, dtype):
    """Loss and gradients; every rewrite is checked in fp64 as well."""
    torch.manual_seed(0)
    base = Model(depth=2).to(dtype)
    x = torch.randn(2, 7, 6).to(dtype)
    method = adaptc.LoRA(r=4, targets=["up", "down"], init="random", dora=dora)

    values = None

    def step(dtype, passes=None, verify=False):
        nonlocal values
        plan = adaptc.Plan([method], passes=passes)
        model = adaptc.compile(copy.deepcopy(base).to(dtype), plan, backend="aot_eager", verify=verify)
        values = values or [p.detach().clone() for p in model.adaptc.parameters()]
        for parameter, value in zip(model.adaptc.parameters(), values, strict=True):
            parameter.data.copy_(value)
        loss = model(x.to(dtype)).square().mean()
        loss.backward()
        (graph,) = model.adaptc.graphs
        return graph, [loss.detach(), *(p.grad for p in model.adaptc.parameters())]

    without, narrow = step(dtype, {"skip": ["widen"]})
    _, exact = step(torch.float64)
    graph, wide = step(dtype, verify="raise")
    reports = {report.name: report for report in graph.reports}
    assert "widen" not in {report.name for report in without.reports}
    assert len(reports["widen"].result.applied) >= 22

    def error(values):
        return sum(float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True))

    assert 0 < error(narrow) < 0.3
    assert error(wide) <= 1.1 * error(narrow)


def test_what_the_backward_keeps_stays_in_the_dtype_of_the_model():
    _, model = adapted(depth=2, dtype=torch.bfloat16)
    graph = trained_graph(model, dtype=torch.bfloat16)
    _, narrow = adapted(depth=2, dtype=torch.bfloat16, passes={"skip": ["widen"]})
    assert 0 < sum(saved_bytes(*graph.parts)) <= sum(saved_bytes(*trained_graph(narrow, dtype=torch.bfloat16).parts))


def test_which_dtypes_are_emulated():
    assert not cpu_emulates(torch.float32) and not cpu_emulates(torch.float64)
    native = torch.cpu.get_capabilities()
    if native.get("avx512_bf16") or native.get("amx_bf16"):
        assert not cpu_emulates(torch.bfloat16)
    if native.get("architecture") == "x86_64" and not native["avx512_f"]:
        assert cpu_emulates(torch.bfloat16) and cpu_emulates(torch.float16)
