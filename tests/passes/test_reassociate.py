"""reassociate: a LoRA layer through a dense weight, where that is legal and faster."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc.codegen import choices
from adaptc.codegen import orders as orders_module
from adaptc.codegen.choices import Choice
from adaptc.codegen.cost import shares
from adaptc.codegen.orders import ORDERS
from adaptc.codegen.roofline import Rates
from adaptc.ir import dialect
from adaptc.ir.ops.lora import draw_tensor
from adaptc.ir.sites import lora_nodes
from adaptc.passes import reassociate as pass_module
from adaptc.passes.reassociate.site import Site, read
from adaptc.passes.reassociate.write import in_order
from tests.models import hosts
from tests.passes.graphs import ops, run_rewrite
from tests.passes.models import Model, adapted, trained_graph
from tests.reference import check_against_reference

#: "dense" reads and writes what "merge" does, and more: both by default where they are told apart.
MERGE = ["merge", pytest.param("dense", marks=pytest.mark.slow)]
OTHERS = [plan for plan in ORDERS if plan != "split"]
RATES = Rates(operations=1e11, bandwidth=1e10, overhead=1e-6)


@pytest.fixture
def chosen(monkeypatch):
    """Sets the order that every site gets, whatever its size."""

    def choose(plan):
        ways = {"split": 1.0, plan: 0.5}
        monkeypatch.setattr(pass_module, "_choose", lambda site: Choice("LoRA", ways, ways, {"split": 10**6, plan: 10}))
        monkeypatch.setattr(orders_module, "WORTH", 1)

    return choose


@pytest.fixture
def timed(monkeypatch):
    """Sets what the roofline and timing say; the questions that were timed."""
    asked = []

    def set_times(seconds, predicted=None, worth=1):
        def measure(question, make):
            asked.append(question)
            return seconds

        monkeypatch.setattr(choices, "measure", measure)
        monkeypatch.setattr(orders_module, "rates", lambda device, dtype: RATES)
        monkeypatch.setattr(orders_module, "WORTH", worth)
        if predicted is not None:
            monkeypatch.setattr(
                orders_module, "_predicted", lambda rate, layer, dtype: {n: predicted[n] for n in layer.names}
            )
        return asked

    return set_times


def applied(model, name="reassociate"):
    (graph,) = model.adaptc.graphs
    return {report.name: report for report in graph.reports}[name].result


# The formulas.


def orders(x, g, W, A, B, s):
    """Every order of RunLoRA's tables, in full: name -> (y, dx, dA, dB)."""
    h, q, Z = x @ A.t(), g @ B, g.t() @ x
    E = W + s * B @ A
    chain, merged = x @ W.t() + s * h @ B.t(), x @ E.t()
    dx, dx_merged = g @ W + s * q @ A, g @ E
    dA, dA_dense = s * q.t() @ x, s * B.t() @ Z
    dB, dB_dense = s * g.t() @ h, s * Z @ A.t()
    return {
        "b1": (chain, dx, dA, dB), "b2": (chain, dx, dA, dB_dense), "b3": (chain, dx, dA_dense, dB_dense),
        "b4": (merged, dx_merged, dA_dense, dB_dense), "b5": (merged, dx_merged, dA, dB),
        "b6": (chain, dx, dA_dense, dB), "b7": (merged, dx_merged, dA_dense, dB),
        "b8": (merged, dx_merged, dA, dB_dense),
    }  # fmt: skip


def joint_of(values, *, conv1d=False, bias=False, input_grad=True):
    """The joint graph of a frozen layer with its adapter: (y, dx, dA, dB)."""

    def step(x, g, W, b, A, B, s):
        with torch.enable_grad():
            x = x.detach().requires_grad_(input_grad)
            A, B = (t.detach().requires_grad_() for t in (A, B))
            right = W if conv1d else W.t()
            rows = x.reshape(-1, x.shape[-1])
            y = torch.addmm(b, rows, right) if bias else rows @ right
            y = y.view(*x.shape[:-1], -1)
            out = dialect.get("lora_linear").overload(x, y, A, B, s, "r")[0]
            found = torch.autograd.grad(out, [x, A, B] if input_grad else [A, B], g)
        return [out.detach(), *found]

    return make_fx(step, tracing_mode="fake")(*values)


@given(data=st.data(), plan=st.sampled_from(OTHERS))
def test_every_order_is_the_chain(data, plan):
    """Values and gradients of the rewritten graph against all orders written out, each equal to the first in fp64."""
    draw = data.draw
    # From two up: the layout of a single row says both or neither, and torch's own backward goes by it.
    batch = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(2, 7)) for _ in range(3))
    conv1d, bias, input_grad = (draw(st.booleans()) for _ in range(3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    values = (
        draw_tensor(draw, (*batch, k), dtype).contiguous(), draw_tensor(draw, (*batch, n), dtype).contiguous(),
        draw_tensor(draw, (k, n) if conv1d else (n, k), dtype).contiguous(), draw_tensor(draw, (n,), dtype),
        draw_tensor(draw, (r, k), dtype), draw_tensor(draw, (n, r), dtype),
        draw_tensor(draw, draw(st.sampled_from([(1,), (r,)])), torch.float64),
    )  # fmt: skip
    gm = joint_of(values, conv1d=conv1d, bias=bias, input_grad=input_grad)
    (node,) = lora_nodes(gm)
    site = read(node)
    assert isinstance(site, Site), site
    run_rewrite(lambda gm, context: iter([in_order(site, plan)]), gm)
    found = ops(gm)
    assert found["lora_merged_weight"] == 1 and not {"lora_linear", "lora_input_grad"} & set(found)
    assert ("lora_dense_grads" in found) == (plan == "dense") and ("lora_shrink" in found) == (plan == "merge")
    x, g, W, b, A, B, s = (t.double() for t in values)
    flat = (x.reshape(-1, k), g.reshape(-1, n), W.t() if conv1d else W)
    # A scale per rank stands where the rank is summed over.
    wants = orders(*flat, A, B * s if len(s) > 1 else B, 1.0 if len(s) > 1 else s)
    if len(s) == 1:
        for one in wants.values():
            for a, b1 in zip(one, wants["b1"], strict=True):
                torch.testing.assert_close(a, b1, rtol=1e-9, atol=1e-9)
    y, dx, dA, dB = wants["b1"]
    y = y + (b if bias else 0)
    dB = dB * s if len(s) > 1 else dB
    wanted = [y.view(*batch, n), *([dx.view(*batch, k)] if input_grad else []), dA, dB]
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    for got, want in zip(gm(*values), wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * (1 + float(want.abs().max())))


# What is legal.


REFUSED = {
    "dropout": ({"dropout": 0.2}, "dropped"),
    "16 bits": ({"dtype": torch.bfloat16}, "not of one dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_is_not_legal(name, chosen, monkeypatch):
    chosen("merge")
    monkeypatch.setattr(orders_module, "could_gain", lambda layer: True)
    options, reason = REFUSED[name]
    _, model = adapted(**options)
    trained_graph(model, dtype=options.get("dtype", torch.float32))
    result = applied(model)
    assert result.applied == [] and [site for site, _ in result.refused] == ["layers.0.up", "layers.0.down"]
    assert all(reason in why for _, why in result.refused)


class Computed(nn.Linear):
    """Its weight is a product of codes and scales, as a quantised one's is."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round() * 0.5, self.bias)


def test_a_weight_that_is_computed_is_not_merged_with(chosen, monkeypatch):
    chosen("merge")
    monkeypatch.setattr(orders_module, "could_gain", lambda layer: True)
    model = adaptc.compile(nn.Sequential(Computed(6, 5)), method(targets="all-linear"), backend="aot_eager")
    model(torch.randn(4, 6)).sum().backward()
    assert applied(model).applied == []
    assert [(site, why.partition(":")[0]) for site, why in applied(model).refused] == [
        ("0", "its frozen layer multiplies by what is computed")
    ]


@pytest.mark.parametrize("plan", MERGE)
def test_a_step_of_any_number_of_rows(plan, chosen):
    """It is chosen for as many as at the capture."""
    chosen(plan)
    torch.manual_seed(0)
    base = Model()
    model = adaptc.compile(copy.deepcopy(base), method(), backend="aot_eager", dynamic=True)
    for rows in ((2, 7), (3, 5), (4, 9)):
        for parameter in model.adaptc.parameters():
            parameter.grad = None
        exact = adaptc.compile(copy.deepcopy(base), method(), backend="eager")
        check_step(model, exact, torch.randn(*rows, 6))
    assert len(applied(model).applied) == 2


def test_without_gradients_a_number_of_rows_that_changes_stays_split(chosen, monkeypatch):
    chosen("merge")
    monkeypatch.setattr(orders_module, "could_gain", lambda layer: True)
    model = adaptc.compile(Model(), method(), backend="aot_eager", dynamic=True)
    with torch.no_grad():
        model(torch.randn(2, 7, 6))
    assert applied(model).applied == [] and len(applied(model).refused) == 2
    assert all("the number of rows is not fixed" in why for _, why in applied(model).refused)


def test_what_would_gain_nothing_has_no_reason(timed):
    """5 rows: nobody misses another order of a layer that drops."""
    timed({"split": 1.0, "merge": 0.5, "dense": 2.0})
    _, model = adapted(dropout=0.2)
    trained_graph(model, rows=(1, 5))
    assert (applied(model).applied, applied(model).refused) == ([], [])


def test_a_scale_at_the_output_stays(chosen, monkeypatch):
    chosen("merge")
    monkeypatch.setattr(orders_module, "could_gain", lambda layer: True)
    _, model = adapted(passes={"skip": ["canonicalise"]})
    trained_graph(model)
    assert {why for _, why in applied(model).refused} == {"its scale is not at the bottleneck"}


def test_a_factor_that_is_frozen_stays(chosen, monkeypatch):
    chosen("merge")
    monkeypatch.setattr(orders_module, "could_gain", lambda layer: True)
    _, model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trained_graph(model)
    assert all("not both of its factors are trained" in why for _, why in applied(model).refused)
    assert len(applied(model).refused) == 2


class BothWays(nn.Module):
    """A square weight that the layer multiplies by, and its transpose by what shares it: one gradient, two products
    with the weight."""

    def __init__(self, layer_first):
        super().__init__()
        self.before, self.fc, self.layer_first = nn.Linear(6, 6), nn.Linear(6, 6), layer_first

    def forward(self, x):
        x = self.before(x)
        parts = self.fc(x), x @ self.fc.weight
        return sum(parts if self.layer_first else parts[::-1])


@pytest.mark.parametrize("plan", OTHERS)
@pytest.mark.parametrize("layer_first", [False, True])
def test_a_weight_that_is_read_both_ways(plan, layer_first, chosen):
    chosen(plan)
    torch.manual_seed(0)
    base, x = BothWays(layer_first), torch.randn(9, 6)
    model = adaptc.compile(copy.deepcopy(base), method(targets=["before", "fc"]), backend="aot_eager", verify="raise")
    check_step(model, adaptc.compile(base, method(targets=["before", "fc"]), backend="eager"), x)
    assert len(applied(model).applied) == 2


@pytest.mark.parametrize("viewed", [False, True])
def test_an_output_that_others_read_stays(viewed):
    """Whole, or in another shape on the way to the adapter."""

    def step(x, W, A, B, s):
        y = (x @ W.t()).view(3, 3, 10)
        seen = (y if viewed else y + 0).view(9, 10)
        out, _ = dialect.get("lora_linear").overload(x, seen, A, B, s, "r")
        return out, y.cos()

    shapes = (9, 6), (10, 6), (4, 6), (10, 4), (1,)
    gm = make_fx(step, tracing_mode="fake")(*map(torch.randn, shapes))
    (node,) = lora_nodes(gm)
    assert ("output is read by others too" if viewed else "no product with a weight, but ends in add") in read(node)


def test_products_of_fewer_digits_than_fp32(chosen, monkeypatch):
    """The correction is below the last digit that TF32 keeps of a weight."""
    chosen("merge")
    monkeypatch.setattr(orders_module, "could_gain", lambda layer: True)
    _, model = adapted()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        trained_graph(model)
    finally:
        torch.set_float32_matmul_precision(before)
    assert applied(model).applied == [] and all("fewer digits" in why for _, why in applied(model).refused)


# Who gets what.


def method(**options):
    return adaptc.LoRA(**{"r": 4, "alpha": 8, "init": "random", "targets": ["up", "down"], **options})


def check_step(model, exact, x):
    """Gradients of every factor against the same model op by op in fp64."""
    exact = exact.double()
    for ours, theirs in zip(model.adaptc.parameters(), exact.adaptc.parameters(), strict=True):
        theirs.data.copy_(ours)
    for one, value in ((model, x), (exact, x.double())):
        one(value).square().mean().backward()
    for ours, theirs in zip(model.adaptc.parameters(), exact.adaptc.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", OTHERS)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"dora": True}], ids=["lora", "lora_bias", "dora"])
def test_a_step_is_the_formula(plan, options, chosen):
    """Every rewrite is checked in fp64, and so is the step."""
    chosen(plan)
    base, model = adapted(depth=2, verify="raise", **options)
    check_step(model, adaptc.compile(copy.deepcopy(base), method(**options), backend="eager"), torch.randn(2, 7, 6))
    assert (len(applied(model).applied), applied(model).refused) == (4, [])
    assert applied(model, "fuse").refused == []


SLOW = pytest.mark.slow
REAL = [
    ("llama", "dense", "aot_eager"), pytest.param("llama", "merge", "aot_eager", marks=SLOW),
    pytest.param("llama", "merge", "inductor", marks=[SLOW, pytest.mark.inductor]),
    pytest.param("gpt2", "dense", "inductor", marks=[SLOW, pytest.mark.inductor]),
]  # fmt: skip


@pytest.mark.parametrize("host, plan, backend", REAL)
def test_real_models(host, plan, backend, chosen):
    """q, k and v read one value: their gradients of it are in one sum."""
    chosen(plan)
    base = hosts.short(host, train=True)
    model = adaptc.compile(
        copy.deepcopy(base), adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear"), backend=backend
    )
    check_against_reference(model, base, hosts.batch(host))
    (graph,) = [g for g in model.adaptc.graphs if g.sites][:1]
    result = {r.name: r for r in graph.reports}["reassociate"].result
    assert len(result.applied) == len(graph.sites) and result.refused == []


@pytest.mark.parametrize("plan", MERGE)
def test_checkpointed_blocks_and_other_sites_of_the_input(plan, chosen):
    """Of q and v alone k's layer is in the sum, without an adapter."""
    chosen(plan)
    method = adaptc.LoRA(r=3, alpha=6, init="random", targets=["q_proj", "v_proj"])
    base = hosts.short("llama", train=True)
    model = adaptc.compile(copy.deepcopy(base), method, backend="aot_eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_against_reference(model, base, hosts.batch("llama"))
    graphs = [{r.name: r.result for r in g.reports}["reassociate"] for g in model.adaptc.graphs if g.sites]
    assert sum(len(result.applied) for result in graphs) == len(model.adaptc.sites)
    assert not any(result.refused for result in graphs)


def test_without_gradients_the_forward_alone_is_written(chosen):
    chosen("merge")
    base, model = adapted(verify="raise")
    x = torch.randn(3, 6)
    with torch.no_grad():
        got = model(x)
    (graph,) = model.adaptc.graphs
    assert len(applied(model).applied) == 2 and "lora_shrink" not in ops(graph.graph_module("reassociate"))
    exact = adaptc.compile(copy.deepcopy(base), method(), backend="eager")
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, exact(x), rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_is_the_identity_to_the_bit(chosen):
    chosen("merge")
    base, model = adapted(init="default")
    x = torch.randn(3, 6)
    assert torch.equal(model(x), base(x)) and len(applied(model).applied) == 2


class Conv1DBlocks(nn.Module):
    """GPT-2's layers, whose weights are stored the other way round, in blocks that are computed again."""

    def __init__(self, layer):
        super().__init__()
        self.up = nn.ModuleList(layer(10, 6) for _ in range(2))
        self.down = nn.ModuleList(layer(6, 10) for _ in range(2))

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = checkpoint(lambda x, up, down: down(up(x).sin()), x, up, down, use_reentrant=False)
        return x


LAYERS = {"linear": lambda n, k: nn.Linear(k, n), "conv1d": Conv1D}


@pytest.mark.parametrize("plan", OTHERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_of_the_weights_size_is_kept_of_a_checkpointed_block(layer, plan, chosen):
    chosen(plan)
    torch.manual_seed(0)
    base, x = Conv1DBlocks(LAYERS[layer]), torch.randn(9, 6).requires_grad_()
    model = adaptc.compile(copy.deepcopy(base), method(targets="all-linear"), backend="aot_eager")
    check_step(model, adaptc.compile(base, method(targets="all-linear"), backend="eager"), x.detach())
    assert len(applied(model).applied) == 4 and not kept_weights(model.adaptc.graphs[0])


def kept_weights(graph):
    """What of a weight's size the forward hands to the backward."""
    output = next(n for n in graph.parts[0].graph.nodes if n.op == "output")
    kept = [n for n in output.all_input_nodes if n.op != "placeholder"]
    assert kept
    return [n for n in kept if tuple(n.meta["val"].shape) in ((6, 10), (10, 6))]


@pytest.mark.parametrize("plan", OTHERS)
def test_nothing_of_the_weights_size_is_kept(plan, chosen):
    chosen(plan)
    _, model = adapted()
    assert not kept_weights(trained_graph(model))


def test_the_large_products_stay_the_base_models(chosen):
    chosen("merge")

    def base_flops(**options):
        found = shares(trained_graph(adapted(**options)[1]).graph_module("lower"))
        return {phase: share.base.flops for phase, share in found.items()}

    assert base_flops() == base_flops(passes={"skip": ["reassociate"]})


def test_a_limit_is_kept(chosen):
    chosen("merge")
    _, model = adapted(passes={"limit": {"reassociate": 1}})
    trained_graph(model)
    assert len(applied(model).applied) == 1 and applied(model).refused == [("layers.0.down", "limit reached")]


# How it is chosen.


def test_what_is_predicted_to_be_slow_is_not_timed(timed):
    asked = timed({"split": 1.0}, {"split": 0.01, "merge": 0.02, "dense": 0.03})
    _, model = adapted()
    (choice, _) = trained_graph(model).choices
    assert asked == [] and applied(model).applied == [] and choice.seconds == {}
    assert (choice.chosen, choice.runner_up, choice.sites) == ("split", ("merge", 2.0), ("layers.0.up",))
    report = str(model.adaptc.explain())
    assert "split; merge is predicted to take 2.00 times as long" in report
    # 14 rows, of 6 and 4 numbers in fp32.
    line = next(i for i, text in enumerate(report.splitlines()) if "keeps 0.00056 MB, merge 0.000336 MB" in text)
    assert report.splitlines()[line + 1].strip() == "layers.0.up"


@pytest.mark.parametrize("library", [False, True], ids=["", "another library"])
def test_what_could_be_the_fastest_is_timed_and_chosen(library, timed, monkeypatch):
    monkeypatch.setattr(orders_module, "may_call_onednn", lambda: library)
    other = ", split by oneDNN" if library else ""
    asked = timed({"split": 1.0, "dense": 0.8}, {"split": 0.010, "merge": 0.0095, "dense": 0.009})
    _, model = adapted()
    graph = trained_graph(model)
    assert [question.rpartition(" (")[0] for question in asked] == [
        "LoRA 16 x 6 x 10, rank 4, no gradient of x, float32: split, dense" + other,
        "LoRA 16 x 10 x 6, rank 4, float32: split, dense" + other,
    ]
    assert [choice.chosen for choice in graph.choices[:2]] == ["dense"] * 2 and len(applied(model).applied) == 2
    assert "dense, 800 ms; split takes 1.25 times as long (1.11 predicted)" in str(model.adaptc.explain())


def test_the_usual_order_is_as_fast_as_the_faster_library(timed, monkeypatch):
    monkeypatch.setattr(orders_module, "may_call_onednn", lambda: True)
    timed({"split": 1.0, "dense": 0.8, "split by oneDNN": 0.7}, {"split": 0.010, "merge": 0.0095, "dense": 0.009})
    _, model = adapted()
    graph = trained_graph(model)
    assert applied(model).applied == []
    for choice in graph.choices[:2]:
        assert choice.chosen == "split" and choice.seconds == {"split": 0.7, "dense": 0.8}


@pytest.mark.parametrize("seconds, predicted", [
    ({"split": 1.0, "merge": 0.97}, {"split": 0.01, "merge": 0.005, "dense": 1}),
    (None, {"split": 0.01, "merge": 0.005, "dense": 1}),
    ({"split": 1.0, "merge": 0.1}, {"split": 10.0, "merge": 5.0, "dense": 20.0}),
], ids=["within the margin", "nothing is to be timed", "too large to be timed"])  # fmt: skip
def test_in_doubt_it_stays_split(seconds, predicted, timed):
    timed(seconds, predicted)
    _, model = adapted()
    trained_graph(model)
    assert applied(model).applied == []


def test_small_layers_are_not_asked_for(timed, monkeypatch):
    asked = timed({"split": 1.0, "merge": 0.1}, worth=orders_module.WORTH)
    monkeypatch.setattr(orders_module, "rates", lambda *args: pytest.fail("nothing is worth it"))
    _, model = adapted()
    assert trained_graph(model).choices == [] and asked == []


def test_deterministic_runs_do_not_depend_on_timing(monkeypatch):
    monkeypatch.setattr(orders_module, "WORTH", 1)
    torch.use_deterministic_algorithms(True)
    try:
        _, model = adapted()
        assert trained_graph(model).choices == [] and applied(model).applied == []
    finally:
        torch.use_deterministic_algorithms(False)
