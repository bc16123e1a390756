"""lift_no_grad: a region without gradients stays, unless a plan names what runs in it, or its class is known."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import NoGradientWarning, PlanError
from adaptc.ir.ops.lora import draw_tensor
from adaptc.passes.contract import Context
from adaptc.passes.lift_no_grad import lift_no_grad
from tests.passes.graphs import DTYPES, Graph, check_adapters, ops, run, tensors
from tests.reference import check_against_reference, factors_of, reference_model, relative_errors

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


def lift(gm, trained, *, own=None, **options):
    """By default as of a class that is known to take its parts for frozen."""
    own = frozenset(trained.values()) if own is None else own
    result = lift_no_grad(gm, Context(trained=trained, own=own, **options))
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


def test_a_region_of_a_known_class_is_lifted():
    values = tensors(grad_x=False)
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
def test_value_and_gradients_where_it_is_asked_for(data):
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
    lift(gm, trained, own=frozenset(), asked=trained)
    check_adapters(gm, values)


def assert_left_alone(gm, trained, reason=None, **options):
    text = gm.code
    result = lift(gm, trained, **options)
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


STAYS = "its no_grad region stays, as the model has it (passes: {lift_no_grad: [...]} in the plan lifts it)"


def test_a_region_stays_where_nobody_asks():
    gm, trained = region(tensors(grad_x=False))
    assert_left_alone(gm, trained, STAYS, own=frozenset())


def test_of_a_known_class_a_region_stays_where_a_gradient_would_reach_what_is_before_it():
    gm, trained = region(tensors(grad_x=True))
    assert_left_alone(gm, trained, "its no_grad region stays: a gradient would flow to what it reads")


def test_a_region_without_adapters_is_lifted_by_the_name_of_a_module_in_it():
    """What it reads gets the gradient: of y = x + W^T's part the product with a frozen weight alone."""
    build = Graph()
    x = build.input("x", torch.randn(4, 5, requires_grad=True))
    weight = build.input("weight", torch.randn(3, 5))
    switch(build, False)
    y = build.call(torch.nn.functional.linear, x, weight)
    switch(build, True)
    gm = build.module(y)
    result = lift(gm, {}, asked={weight: "teacher"})
    assert [r.site for r in result.applied] == ["teacher"]
    g = torch.randn(4, 3)
    _, grads = run(gm, build.inputs, g)
    torch.testing.assert_close(grads["x"], g @ build.inputs[1])


def test_inference_mode_is_a_region_whatever_is_switched_on_inside_it():
    values = tensors(grad_x=False)
    build = Graph()
    nodes, trained = inputs(build, values)
    mode = build.graph.call_function(torch.autograd.grad_mode._enter_inference_mode, (True,))
    switch(build, True)
    y = adapter(build, nodes)
    build.graph.call_function(torch.autograd.grad_mode._exit_inference_mode, (mode,))
    gm = build.module(build.call(torch.clone, y))
    assert len(lift(gm, trained).applied) == 1
    assert "inference" not in gm.code
    check_adapters(gm, values)


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
    values = tensors(ranks=(2, 3), grad_x=False)
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
    values = tensors(grad_x=False)
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


def pair(targets, backend="aot_eager", lift=("tower",), **options):
    """(model without the region, compiled model with it), of equal weights."""
    torch.manual_seed(0)
    plain, host = Plain(**options), Tower(**options)
    host.load_state_dict(plain.state_dict())
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets=targets)
    return plain, adaptc.compile(host, plan, backend=backend, verify="raise", lift_no_grad=lift).train()


@pytest.mark.parametrize("backend, checkpoint", [("eager", False), ("aot_eager", False), ("aot_eager", True)])
def test_a_captured_region(backend, checkpoint):
    plain, model = pair("all-linear", backend, checkpoint=checkpoint)
    check_against_reference(model, plain, torch.randn(4, 6))
    (graph,) = model.adaptc.graphs
    assert [r.name for r in graph.reports][:2] == ["insert", "lift_no_grad"]
    rows = str(model.adaptc.explain())
    assert "inside a torch.no_grad region, which records gradients for it: tower.{0,2}" in rows


def test_a_captured_region_that_is_not_named_stays():
    plain, model = pair(["head"], lift=())
    check_against_reference(model, plain, torch.randn(4, 6))
    (graph,) = model.adaptc.graphs
    assert graph.stage("insert") == graph.stage("lift_no_grad")


def test_without_gradients_nothing_is_lifted():
    _, model = pair("all-linear")
    with torch.no_grad():
        model(torch.randn(4, 6))
    (graph,) = model.adaptc.graphs
    assert not graph.training and graph.reports[1].result.applied == []


def test_a_tower_that_also_runs_with_gradients_is_in_the_report_alone():
    _, model = pair(["0", "2"], also=True, lift=())
    model(torch.randn(4, 6)).sum().backward()
    (graph,) = model.adaptc.graphs
    assert graph.reports[1].result.refused == [("tower.0", STAYS), ("tower.2", STAYS)]
    assert STAYS in str(model.adaptc.explain())


# ------------------------------------------------------------------------------- as users write it


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return x + self.out(torch.tanh(self.proj(x)))


class Distilled(nn.Module):
    """Towers of two blocks: what a student makes, less the target that a teacher makes without gradients."""

    KINDS = ("no_grad", "inference_mode", "set_grad_enabled", "decorator", "enable_grad", "graph break")

    def __init__(self, kind="none"):
        super().__init__()
        self.stem = nn.Linear(5, 5)
        self.student, self.teacher = (nn.ModuleList([Block(), Block()]) for _ in range(2))
        self.kind = kind

    def forward(self, x):
        h = self.stem(x)
        target = getattr(self, self.kind.replace(" ", "_"))(h)
        for block in self.student:
            h = block(h)
        return (h - target).pow(2).mean()

    def none(self, h):
        for block in self.teacher:
            h = block(h)
        return h

    def no_grad(self, h):
        with torch.no_grad():
            return self.none(h)

    def inference_mode(self, h):
        with torch.inference_mode():
            return self.none(h)

    def set_grad_enabled(self, h):
        torch.set_grad_enabled(False)
        h = self.none(h)
        torch.set_grad_enabled(True)
        return h

    @torch.no_grad()
    def decorator(self, h):
        return self.none(h)

    def enable_grad(self, h):
        with torch.no_grad():
            with torch.enable_grad():
                h = self.teacher[0](h)
            return self.teacher[1](h)

    def graph_break(self, h):
        with torch.no_grad():
            h = self.teacher[0](h)
            torch._dynamo.graph_break()
            return self.teacher[1](h)


DISTIL = adaptc.LoRA(r=2, alpha=4, init="random", targets=["stem", "proj"])


def distilled(kind, plan=DISTIL, backend="eager", **options):
    """(the model without adaptc, compiled model), of equal weights."""
    torch.manual_seed(0)
    host = Distilled(kind)
    plain = copy.deepcopy(host)
    return plain, adaptc.compile(host, plan, backend=backend, **options).train()


def gradients(model, x):
    model.zero_grad()
    model(x).backward()
    named = {n: p.grad for n, p in model.named_parameters() if ".adapters." in n}
    return {name: gradient for name, gradient in named.items() if gradient is not None and gradient.any()}


def expected(model, plain, x):
    """Of the formula in fp64, with the host's own stop-gradients: gradients that are not zero."""
    factors = factors_of(model)
    reference = reference_model(plain, factors).double()
    reference(x.double()).backward()
    modules = {path: reference.get_submodule(path) for path in factors}
    found = {f"{p}.adapters.default.lora_{f}": getattr(m, f).grad for p, m in modules.items() for f in "AB"}
    return {name: gradient for name, gradient in found.items() if gradient is not None and gradient.any()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert max(relative_errors({n: g.double() for n, g in got.items()}, want).values()) < 1e-5


def _tier(kind, backend, regional):
    if (kind, backend) in {("no_grad", "aot_eager"), ("inference_mode", "eager"), ("enable_grad", "eager")}:
        return []
    if (kind, backend) == ("no_grad", "inductor") or (backend != "inductor" and not regional):
        return [pytest.mark.slow]
    return [pytest.mark.long]


MATRIX = [
    pytest.param(kind, backend, regional, marks=_tier(kind, backend, regional))
    for kind in Distilled.KINDS for backend in ("eager", "aot_eager", "inductor") for regional in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("kind, backend, regional", MATRIX)
def test_a_stop_gradient_stays_and_is_named_with_its_cure(kind, backend, regional):
    plain, model = distilled(kind, backend=backend, regional=regional)
    x = torch.randn(4, 5)
    names = '["teacher.1"]' if kind == "enable_grad" else '["teacher"]'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoGradientWarning)
        got = gradients(model, x)
    texts = [str(w.message) for w in caught if isinstance(w.message, NoGradientWarning)]
    assert "runs under torch.no_grad in the model's forward, which stays" in texts[0]
    assert f"passes: {{lift_no_grad: {names}}} in the plan" in texts[0]
    assert_same(got, expected(model, plain, x))
    assert not any("teacher" in name for name in got)
    gradients(model, x)  # said once: warnings are errors
    assert f"(lift_no_grad: {names})" in str(model.adaptc.explain())
    assert bool(model.adaptc.captures.epoch.regions) is regional


@pytest.mark.parametrize("kind, backend, regional", MATRIX)
def test_a_region_that_is_named_records_gradients(kind, backend, regional):
    plain, model = distilled(kind, backend=backend, regional=regional, lift_no_grad=["teacher"])
    plain.kind = "none"
    x = torch.randn(4, 5)
    want = expected(model, plain, x)
    assert any("teacher" in name for name in want)
    assert_same(gradients(model, x), want)
    row = f"records gradients for it: teacher.{'1' if kind == 'enable_grad' else '{0,1}'}.proj"
    assert row in str(model.adaptc.explain())


def test_the_plan_says_it_too_and_is_saved_with_it(tmp_path):
    plan = adaptc.Plan(DISTIL, passes={"lift_no_grad": ["re:teacher"]})
    plain, model = distilled("no_grad", plan)
    plain.kind = "none"
    model.adaptc.save(tmp_path)
    host = copy.deepcopy(plain)
    host.kind = "no_grad"
    again = adaptc.compile(host, tmp_path, backend="eager").train()
    x = torch.randn(4, 5)
    want = expected(model, plain, x)
    assert_same(gradients(model, x), want)
    assert_same(gradients(again, x), want)
    assert adaptc.compile(model, plan) is model
    named = adaptc.compile(Distilled("no_grad"), DISTIL, backend="eager", lift_no_grad="re:teacher")
    assert named.adaptc.records["default"].plan == plan
    assert adaptc.compile(named, DISTIL) is named


def test_adapters_whose_plans_lift_other_regions_are_captured_apart():
    plain, model = distilled("no_grad")
    model.adaptc.add("lifting", adaptc.Plan(DISTIL, passes={"lift_no_grad": ["teacher"]}))
    x = torch.randn(4, 5)
    with pytest.warns(NoGradientWarning):
        assert not any("teacher" in name for name in gradients(model, x))
    with pytest.warns(adaptc.errors.NewSignatureWarning):
        model.adaptc.switch("lifting")
    assert any("teacher" in name for name in gradients(model, x))
    graphs = len(model.adaptc.graphs)
    with model.adaptc.disable_adapter():
        pass
    assert len(model.adaptc.graphs) == graphs


def test_a_lift_that_names_nothing_is_refused_before_anything_changes():
    host = Distilled("no_grad")
    with pytest.raises(PlanError, match=r'passes\.lift_no_grad: "teachers" matches nothing') as caught:
        adaptc.compile(host, DISTIL, lift_no_grad=["teachers"])
    assert "nearest names: teacher (1)" in caught.value.facts["found"]
    assert not hasattr(host, "adaptc") and all(p.requires_grad for p in host.parameters())


def test_a_lift_of_a_module_that_no_region_runs_is_in_the_report():
    _, model = distilled("no_grad", adaptc.LoRA(r=2, init="random", targets=["stem"]), lift_no_grad=["student"])
    gradients(model, torch.randn(4, 5))
    rows = str(model.adaptc.explain())
    assert "lift_no_grad names it, and no captured region without gradients runs it: student" in rows


def test_a_plan_can_leave_the_pass_out():
    torch.manual_seed(0)
    plan = adaptc.Plan([adaptc.LoRA(r=3, targets=["0", "2", "head"])], passes={"skip": ["lift_no_grad"]})
    model = adaptc.compile(Tower(), plan, backend="aot_eager").train()
    with pytest.warns(NoGradientWarning, match=r"which stays, .*: tower\.0, tower\.2 "):
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
    method = adaptc.LoRA(r=2, init="random", targets=["fc"])
    assert not adaptc.rewrite(gm, method, [x])(x).requires_grad
    rewritten = adaptc.rewrite(gm, adaptc.Plan(method, passes={"lift_no_grad": ["fc"]}), [x])
    rewritten(x).sum().backward()
    assert all(p.grad is not None for n, p in rewritten.named_parameters() if ".adapters." in n)
