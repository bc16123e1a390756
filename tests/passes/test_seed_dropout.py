"""seed_dropout: masks of adapters are functions of seeds, made again in the backward and never kept."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import VerifyError
from adaptc.ir import dialect
from adaptc.ir.ops.dropout import keep_mask
from adaptc.ir.ops.lora import draw_tensor
from adaptc.passes import manager
from adaptc.passes.contract import Context
from adaptc.passes.manager import op_counts
from adaptc.passes.seed_dropout import seed_dropout
from tests.models import hosts
from tests.passes.graphs import DTYPES, Graph, ops, tensors
from tests.passes.models import adapted, trained_graph

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])


def dropped(values, p=0.3, *, write=None):
    """An adapter whose input goes through a dropout, as ``insert`` writes it."""
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    dropout = write(build, x) if write else build.call(F.dropout, x, p, True)
    return build, dropout, build.lora(dropout, y, a, b, s)


def test_a_dropout_of_an_adapter_gets_a_seed():
    build, _, y = dropped(tensors())
    gm = build.module(y)
    result = seed_dropout(gm, Context())
    assert [(r.site, r.removed) for r in result.applied] == [("fc", ("dropout",))]
    assert ops(gm) == {"randint": 1, "seeded_dropout": 1, "lora_linear": 1}


def test_stops_at_its_limit():
    values = tensors(ranks=(2, 3))
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    y1 = build.lora(build.call(F.dropout, x, 0.3, True), y, a1, b1, s1, site="first")
    gm = build.module(build.lora(build.call(F.dropout, x, 0.3, True), y1, a2, b2, s2, site="second"))
    result = seed_dropout(gm, Context(budget=1))
    assert [r.site for r in result.applied] == ["first"] and result.refused == [("second", "limit reached")]
    assert ops(gm) == {"randint": 1, "seeded_dropout": 1, "dropout": 1, "lora_linear": 2}


@pytest.mark.parametrize("write", [
    lambda build, x: build.call(F.dropout, x, 0.3, False),
    lambda build, x: build.call(F.dropout, x, 0.0, True),
    lambda build, x: build.call(F.dropout, x, 0.3, True, True),
    lambda build, x: build.call(F.alpha_dropout, x, 0.3, True),
    lambda build, x: build.call(torch.neg, build.call(F.dropout, x, 0.3, True)),
], ids=["eval", "p = 0", "in place", "another function", "read by something else"])  # fmt: skip
def test_any_other_dropout_stays(write):
    build, _, y = dropped(tensors(grad_x=False), write=write)
    gm = build.module(y)
    text = gm.code
    result = seed_dropout(gm, Context())
    assert (result.applied, result.refused, gm.code) == ([], [], text)


def test_a_dropout_that_the_base_model_reads_too_stays():
    build, dropout, y = dropped(tensors())
    gm = build.module(y, build.call(torch.sin, dropout))
    assert seed_dropout(gm, Context()).applied == []


@given(data=st.data())
def test_value_and_gradients(data):
    """Against the formula in fp64 with the mask of the seed that the graph drew."""
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 7)) for _ in range(3))
    p = draw(st.sampled_from([0.05, 0.5, 0.9]))
    values = {
        "x": draw_tensor(draw, (*batch, k), dtype).requires_grad_(),
        "y": draw_tensor(draw, (*batch, n), dtype).requires_grad_(),
        "A1": draw_tensor(draw, (r, k), dtype).requires_grad_(),
        "B1": draw_tensor(draw, (n, r), dtype).requires_grad_(),
        "s1": draw_tensor(draw, (1,), torch.float64),
    }
    build, _, y = dropped(values, p)
    gm = build.module(y)
    assert len(seed_dropout(gm, Context()).applied) == 1
    gm.graph.lint()
    torch.manual_seed(3)
    out = gm(*values.values())[0]
    torch.manual_seed(3)
    mask = keep_mask(values["x"], torch.randint(2**62, (1,)), p).double() / (1 - p)
    doubles = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in values.items()}
    h = torch.einsum("...k,rk->...r", doubles["x"] * mask, doubles["A1"])
    want = doubles["y"] + doubles["s1"] * torch.einsum("...r,nr->...n", h, doubles["B1"])
    g = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    names = [name for name in values if values[name].requires_grad]
    got = torch.autograd.grad(out, [values[n] for n in names], g.to(dtype))
    expected = torch.autograd.grad(want, [doubles[n] for n in names], g.to(dtype).double())
    unit = 16 * torch.finfo(dtype).eps
    for one, other in zip((out, *got), (want, *expected), strict=True):
        size = float(other.detach().abs().max()) + 4 / (1 - p) ** 2 * k * r
        assert float((one.detach().double() - other.detach()).abs().max()) <= unit * size


def loss_of(model, x, seed):
    torch.manual_seed(seed)
    return model(x).square().sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_the_gradient_is_of_the_loss_that_was_computed(backend):
    """By differences along the gradient, with masks that equal seeds repeat: a backward that drops other elements
    fails."""
    _, model = adapted(dtype=torch.float64, dropout=0.4, backend=backend)
    x = torch.randn(3, 6, dtype=torch.float64)
    parameters = list(model.adaptc.parameters())
    model.train()
    loss_of(model, x, 4).backward()
    grads = [p.grad.clone() for p in parameters]
    step = 1e-5
    moved = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, g in zip(parameters, grads, strict=True):
                p += sign * step * g
            moved.append(float(loss_of(model, x, 4)))
    slope = (moved[0] - moved[1]) / (2 * step)
    assert slope == pytest.approx(float(sum((g * g).sum() for g in grads)), rel=1e-6)


def test_seeds_repeat_with_torchs_and_change_with_every_call():
    _, model = adapted(dropout=0.4)
    x = torch.randn(3, 6)
    first, again = loss_of(model, x, 4), loss_of(model, x, 4)
    assert torch.equal(first, again) and not torch.equal(loss_of(model, x, 5), first)
    torch.manual_seed(4)
    assert not torch.equal(model(x), model(x))


def test_two_forwards_before_a_backward():
    _, model = adapted(dtype=torch.float64, dropout=0.4)
    x = torch.randn(3, 6, dtype=torch.float64)
    parameters = list(model.adaptc.parameters())
    alone = []
    for seed in (4, 5):
        alone.append(torch.autograd.grad(loss_of(model, x, seed), parameters))
    losses = [loss_of(model, x, seed) for seed in (4, 5)]
    for loss, want in zip(reversed(losses), reversed(alone), strict=True):
        got = torch.autograd.grad(loss, parameters)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_every_site_has_a_mask_of_its_own():
    """q, k and v read one value; PEFT drops other elements of it in each."""
    model = nn.Sequential(nn.Linear(4, 4))
    base = hosts.short("llama", train=True)
    model = adaptc.compile(base, adaptc.LoRA(r=2, dropout=0.5, targets=["q_proj", "k_proj", "v_proj"]), backend="eager")
    model(**hosts.batch("llama"))
    (graph,) = model.adaptc.graphs
    gm = graph.graph_module("seed_dropout")
    nodes = list(gm.graph.find_nodes(op="call_function", target=dialect.get("seeded_dropout").overload))
    assert len({node.args[0] for node in nodes}) == 1 and len({node.args[1] for node in nodes}) == 3


@pytest.mark.parametrize("rates", [(0.2, 0.6), (0.6, 0.2), (0.0, 0.5)])
def test_two_adapters_of_a_site_drop_at_their_own_rates(rates):
    """Against the formula in fp64 with the masks of the seeds, which are drawn in the adapters' order."""
    methods = [adaptc.LoRA(r=3, alpha=6, init="random", dropout=p, targets=["0"]) for p in rates]
    model = adaptc.compile(nn.Sequential(nn.Linear(40, 5)).double().train(), methods[0], backend="aot_eager")
    model.adaptc.add("other", methods[1])
    model.adaptc.switch(["default", "other"])
    x = torch.randn(30, 40, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = model(x)
    out.square().sum().backward()
    torch.manual_seed(3)
    seeds = iter(torch.randint(2**62, (2,)).split(1))
    copied = x.detach().requires_grad_()
    want, factors = nn.functional.linear(copied, model[0].weight, model[0].bias), []
    for name, p in zip(("default", "other"), rates, strict=True):
        A, B = (getattr(model[0].adapters[name], f"lora_{f}").detach().requires_grad_() for f in "AB")
        mask = keep_mask(x, next(seeds), p) / (1 - p) if p else 1
        want = want + 2 * (copied * mask) @ A.T @ B.T
        factors += [A, B]
    want.square().sum().backward()
    torch.testing.assert_close(out, want)
    got = [x, *(p for name in ("default", "other") for p in model.adaptc.parameters(name))]
    for one, other in zip(got, [copied, *factors], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def saved(graph):
    """(dtype, shape) of what the forward keeps for the backward, beyond the model's own tensors."""
    forward, _ = graph.parts
    outputs = [n.meta["val"] for n in forward.graph.output_node().args[0] if hasattr(n, "meta")]
    return [(t.dtype, tuple(t.shape)) for t in outputs if isinstance(t, torch.Tensor)]


def test_neither_mask_nor_dropped_input_is_kept():
    _, plain = adapted()
    _, model = adapted(dropout=0.4)
    _, unseeded = adapted(dropout=0.4, passes={"skip": ["seed_dropout"]})
    without, kept, with_masks = [saved(trained_graph(m)) for m in (plain, model, unseeded)]
    assert not any(dtype == torch.bool for dtype, _ in kept) and any(dtype == torch.bool for dtype, _ in with_masks)
    assert kept.count((torch.int64, (1,))) == 2
    sizes = [sum(dtype.itemsize * math.prod(shape) for dtype, shape in s) for s in (without, kept, with_masks)]
    assert sizes[1] <= sizes[0] + 2 * 8 < sizes[2]


@pytest.mark.parametrize("dtype, options", [
    pytest.param(torch.float32, {"dora": True}, id="fp32-dora"), pytest.param(torch.bfloat16, {}, id="bf16-lora"),
    pytest.param(torch.float32, {}, id="fp32-lora", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, {"dora": True}, id="bf16-dora", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_block_that_is_computed_again_has_the_same_masks(dtype, options):
    plan = adaptc.LoRA(r=3, alpha=6, dropout=0.1, init="random", targets="all-linear", **options)
    base = hosts.short("llama", train=True).to(dtype)
    batch = hosts.batch("llama")
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.adaptc.parameters()]))
        if options:  # the base's products read what is dropped too: torch's own masks
            continue
        counts = [op_counts(g.graph_module("seed_dropout")) for g in model.adaptc.graphs]
        assert sum(c.get("seeded_dropout", 0) for c in counts) == 7 and not any(c.get("dropout") for c in counts)
        assert sum(c.get("randint", 0) for c in counts) == 7
    assert torch.equal(found[0][0], found[1][0])
    for plain, recomputed in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(plain, recomputed)


def refusals(model):
    report = next(r for r in trained_graph(model).reports if r.name == "seed_dropout")
    assert report.result.applied == []
    return report.result.refused


def test_a_mask_that_is_kept_is_told_and_a_dropout_of_the_base_model_is_not():
    _, model = adapted(dropout=0.4, dora=True)
    reason = "the base model's product reads what it drops too: its mask is kept"
    assert refusals(model) == [("layers.0.up", reason), ("layers.0.down", reason)]
    base = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)).train()
    model = adaptc.compile(base, adaptc.LoRA(r=2, targets="all-linear"), backend="aot_eager")
    model(torch.randn(3, 6)).sum().backward()
    (graph,) = model.adaptc.graphs
    assert [r.result.refused for r in graph.reports if r.name == "seed_dropout"] == [[]]


def test_verified_it_holds():
    _, model = adapted(dropout=0.4, verify="raise")
    report = next(r for r in trained_graph(model).reports if r.name == "seed_dropout")
    assert len(report.result.applied) == 2 and report.errors is not None and report.rolled_back is None


def wrong_probability(gm, context):
    result = seed_dropout(gm, context)
    for rewrite in result.applied:
        for graph in (gm.graph, rewrite.after.graph):
            for node in graph.find_nodes(op="call_function", target=dialect.get("seeded_dropout").overload):
                node.args = (*node.args[:2], 0.41)
    gm.recompile()
    return result


def test_a_wrong_pass_is_found(monkeypatch):
    real = manager.get

    def get(name):
        one = real(name)
        return manager.Pass(name, wrong_probability, one.contract) if name == "seed_dropout" else one

    monkeypatch.setattr(manager, "get", get)
    _, model = adapted(dropout=0.4, verify="raise")
    with pytest.raises(Exception, match="after pass seed_dropout") as error:
        trained_graph(model)
    causes = [error.value, error.value.__cause__, getattr(error.value, "inner_exception", None)]
    assert any(isinstance(cause, VerifyError) for cause in causes)
