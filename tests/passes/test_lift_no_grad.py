"""lift_no_grad: a no_grad region with trained adapters inside records gradients, any other stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import LiftedRegionWarning
from adaptc.ir.lora import draw_tensor
from adaptc.passes.contract import Context
from adaptc.passes.lift_no_grad import lift_no_grad
from tests.passes.graphs import DTYPES, Graph, check_adapters, ops, run, tensors
from tests.reference import check_against_reference

SET = "_set_grad_enabled"


def switch(build: Graph, mode: bool) -> None:
    """As Dynamo writes it; not run while the graph is built."""
    build.graph.call_function(torch._C._set_grad_enabled, (mode,))


def inputs(build: Graph, values):
    nodes = {name: build.input(name, tensor) for name, tensor in values.items()}
    trained = {node: "fc" for name, node in nodes.items() if name[0] in "AB"}
    return nodes, trained


def adapter(build, nodes, number=1, y=None):
    factors = (nodes[f"{name}{number}"] for name in "ABs")
    return build.lora(nodes["x"], nodes["y"] if y is None else y, *factors)


def lift(gm, trained, **options):
    result = lift_no_grad(gm, Context(trained=trained, **options))
    gm.recompile()
    gm.graph.lint()
    return result


def region(values, **options):
    """One adapter in a region, and what comes out of it scaled outside."""
    build = Graph()
    nodes, trained = inputs(build, values)
    switch(build, False)
    y = adapter(build, nodes)
    switch(build, True)
    gm = build.module(y)
    return gm, trained


def test_a_region_with_a_trained_adapter_is_lifted():
    values = tensors()
    gm, trained = region(values)
    g = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="does not require grad"):
        run(gm, list(values.values()), g)
    assert ops(gm)[SET] == 2
    result = lift(gm, trained)
    assert [r.site for r in result.applied] == ["fc"] and result.refused == []
    assert ops(gm)[SET] == 1
    check_adapters(gm, values)
    (y,) = gm.graph.output_node().args[0]
    assert y.meta["example_value"].requires_grad


@given(data=st.data())
def test_value_and_gradients(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, ranks = (
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
        draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    )
    values = {
        "x": draw_tensor(draw, (*rows, k), dtype).requires_grad_(draw(st.booleans())),
        "y": draw_tensor(draw, (*rows, n), dtype).requires_grad_(draw(st.booleans())),
    }
    for i, r in enumerate(ranks, start=1):
        values[f"A{i}"] = draw_tensor(draw, (r, k), dtype).requires_grad_()
        values[f"B{i}"] = draw_tensor(draw, (n, r), dtype).requires_grad_()
        values[f"s{i}"] = draw_tensor(draw, (1,), torch.float64)
    build = Graph()
    nodes, trained = inputs(build, values)
    trained = {node: node.name[1:] for node in trained}
    y = nodes["y"]
    for i in range(1, len(ranks) + 1):
        # Nested regions, as no_grad inside no_grad is captured, and stretches between them.
        depth = draw(st.integers(0, 2))
        for _ in range(depth):
            switch(build, False)
        y = adapter(build, nodes, i, y)
        for level in range(depth):
            switch(build, level == depth - 1)
    gm = build.module(build.call(torch.clone, y))
    lift(gm, trained)
    check_adapters(gm, values)


def assert_left_alone(gm, trained, reason=None):
    text = gm.code
    result = lift(gm, trained)
    assert (result.applied, gm.code) == ([], text)
    assert result.refused == ([] if reason is None else [("fc", reason)])


def test_a_region_without_adapters_stays():
    values = tensors()
    build = Graph()
    nodes, trained = inputs(build, values)
    switch(build, False)
    target = build.call(torch.tanh, nodes["x"])
    switch(build, True)
    assert_left_alone(build.module(adapter(build, nodes), target), trained)


def test_a_region_with_an_adapter_that_is_not_trained_stays():
    gm, _ = region(tensors(trained=False))
    assert_left_alone(gm, {})


def test_a_region_whose_adapter_also_runs_outside_stays():
    values = tensors()
    build = Graph()
    nodes, trained = inputs(build, values)
    switch(build, False)
    target = adapter(build, nodes)
    switch(build, True)
    gm = build.module(adapter(build, nodes), target)
    assert_left_alone(gm, trained, "its no_grad region stays: fc also runs outside of it")


def test_stops_at_its_limit():
    values = tensors(ranks=(2, 3))
    build = Graph()
    nodes, trained = inputs(build, values)
    trained = {node: node.name[1:] for node in trained}
    outputs = []
    for number in (1, 2):
        switch(build, False)
        outputs.append(adapter(build, nodes, number))
        switch(build, True)
    result = lift(build.module(*outputs), trained, budget=1)
    assert [r.site for r in result.applied] == ["1"] and result.refused == [("2", "limit reached")]


def test_gradients_that_are_switched_on_inside_split_a_region():
    """no_grad, with enable_grad inside: the adapter stands in the second stretch without gradients alone."""
    values = tensors()
    build = Graph()
    nodes, trained = inputs(build, values)
    for mode in (False, True, False):
        switch(build, mode)
    y = adapter(build, nodes)
    switch(build, True)
    gm = build.module(y)
    assert len(lift(gm, trained).applied) == 1
    assert [n.args[0] for n in gm.graph.nodes if SET in str(n.target)] == [False, True, True]
    check_adapters(gm, values)


# -------------------------------------------------------------------------------------- as captured


class Plain(nn.Module):
    """A tower and a head; ``also`` calls the tower a second time."""

    def __init__(self, also=False, checkpoint=False):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8))
        self.head = nn.Linear(8, 3)
        self.also, self.checkpoint = also, checkpoint

    def forward(self, x):
        if self.checkpoint:
            h = torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=False)
        else:
            h = self.features(x)
        return self.head(h + self.tower(x) if self.also else h)

    def features(self, x):
        return self.tower(x)


class Tower(Plain):
    """The same, with its tower in a no_grad region."""

    def features(self, x):
        with torch.no_grad(), torch.no_grad():
            return self.tower(x)


def pair(targets, backend="aot_eager", **options):
    """(model without the region, compiled model with it), of equal weights."""
    torch.manual_seed(0)
    plain, host = Plain(**options), Tower(**options)
    host.load_state_dict(plain.state_dict())
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets=targets)
    return plain, adaptc.compile(host, plan, backend=backend, verify="raise").train()


@pytest.mark.parametrize("backend, checkpoint", [("eager", False), ("aot_eager", False), ("aot_eager", True)])
def test_a_captured_region(backend, checkpoint):
    plain, model = pair("all-linear", backend, checkpoint=checkpoint)
    x = torch.randn(4, 6)
    with pytest.warns(LiftedRegionWarning, match=r"tower\.0, tower\.2 \(leave"):
        check_against_reference(model, plain, x)
    check_against_reference(model, plain, x)  # said once
    (graph,) = model.adaptc.graphs
    assert [r.name for r in graph.reports][:2] == ["insert", "lift_no_grad"]
    rows = str(model.adaptc.explain())
    assert "inside a torch.no_grad region, which records gradients for it: tower.{0,2}" in rows


def test_a_captured_region_without_adapters_stays():
    plain, model = pair(["head"])
    check_against_reference(model, plain, torch.randn(4, 6))
    (graph,) = model.adaptc.graphs
    assert graph.reports[1].result.applied == []
    assert graph.stage("insert") == graph.stage("lift_no_grad")


def test_without_gradients_nothing_is_lifted():
    _, model = pair("all-linear")
    with torch.no_grad():
        model(torch.randn(4, 6))
    (graph,) = model.adaptc.graphs
    assert not graph.training and graph.reports[1].result.applied == []


def test_a_tower_that_also_runs_with_gradients_keeps_its_region():
    _, model = pair(["0", "2"], also=True)
    model(torch.randn(4, 6)).sum().backward()
    (graph,) = model.adaptc.graphs
    reason = "its no_grad region stays: tower.0 also runs outside of it"
    assert graph.reports[1].result.refused == [("tower.0", reason), ("tower.2", reason)]
    assert reason in str(model.adaptc.explain())


def test_a_plan_can_leave_the_pass_out():
    torch.manual_seed(0)
    plan = adaptc.Plan([adaptc.LoRA(r=3, targets=["0", "2", "head"])], passes={"skip": ["lift_no_grad"]})
    model = adaptc.compile(Tower(), plan, backend="aot_eager").train()
    with pytest.warns(adaptc.errors.NoGradientWarning, match=r"does not depend on its output: tower\.0, tower\.2"):
        model(torch.randn(4, 6)).sum().backward()
    assert model.adaptc.sites[0].adapters["default"].lora_A.grad is None


def test_a_plain_graph_module():
    """``adaptc.rewrite`` lifts as the backend does."""

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x)

    gm = torch.fx.symbolic_trace(Region())
    first = next(n for n in gm.graph.nodes if n.op == "call_module")
    with gm.graph.inserting_before(first):
        gm.graph.call_function(torch._C._set_grad_enabled, (False,))
    with gm.graph.inserting_after(first):
        gm.graph.call_function(torch._C._set_grad_enabled, (True,))
    gm.recompile()
    x = torch.randn(2, 5)
    rewritten = adaptc.rewrite(gm, adaptc.LoRA(r=2, init="random", targets=["fc"]), [x])
    rewritten(x).sum().backward()
    assert all(p.grad is not None for n, p in rewritten.named_parameters() if ".adapters." in n)
