"""share: sites that read one value read it once, forward and backward."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import adaptc
from adaptc.errors import NewSignatureWarning, VerifyError
from adaptc.ir import dialect
from adaptc.ir.ops.lora import draw_tensor
from adaptc.passes import manager
from adaptc.passes.contract import Context
from adaptc.passes.share import share
from tests.ir.formulas import assert_within, rounding_bound
from tests.models import hosts
from tests.passes.graphs import DTYPES, ops
from tests.reference import check_against_reference

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


def joint_of(values, ranks):
    """The joint graph of frozen layers that read one x, each with its adapter; outputs and then gradients."""

    def step(x, grads, weights, A, B, scales):
        leaves = [x, *A, *B]
        with torch.enable_grad():
            x, *factors = [t.detach().requires_grad_() for t in leaves]
            A, B = factors[: len(A)], factors[len(A) :]
            outs = [
                dialect.get("lora_linear").overload(x, x @ w.t(), a, b, s, "r")[0]
                for w, a, b, s in zip(weights, A, B, scales, strict=True)
            ]
            found = torch.autograd.grad(outs, [x, *A, *B], grads)
        return [o.detach() for o in outs], list(found)

    return make_fx(step, tracing_mode="fake")(*values)


def values_of(draw, dtype, factors):
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k = draw(st.integers(1, 7))
    widths = draw(st.lists(st.integers(1, 7), min_size=2, max_size=3))
    ranks = [draw(st.integers(1, 4)) for _ in widths]
    return (
        draw_tensor(draw, (*batch, k), dtype),
        [draw_tensor(draw, (*batch, n), dtype) for n in widths],
        [draw_tensor(draw, (n, k), dtype) for n in widths],
        [draw_tensor(draw, (r, k), factors) for r in ranks],
        [draw_tensor(draw, (n, r), factors) for n, r in zip(widths, ranks, strict=True)],
        [draw_tensor(draw, (1,), torch.float64) for _ in widths],
    ), ranks


def formula(x, grads, weights, A, B, scales):
    """y_g = x W_g^T + s_g x A_g^T B_g^T and the gradients, written out in what is given (fp64)."""
    outs, dA, dB, dx = [], [], [], 0
    for g, w, a, b, s in zip(grads, weights, A, B, scales, strict=True):
        h = torch.einsum("...k,rk->...r", x, a)
        q = s * torch.einsum("...n,nr->...r", g, b)
        outs.append(torch.einsum("...k,nk->...n", x, w) + s * torch.einsum("...r,nr->...n", h, b))
        dA.append(torch.einsum("...r,...k->rk", q, x))
        dB.append(s * torch.einsum("...n,...r->nr", g, h))
        dx = dx + torch.einsum("...n,nk->...k", g, w) + torch.einsum("...r,rk->...k", q, a)
    return [*outs, dx, *dA, *dB]


def mapped(function, values):
    return [[function(t) for t in v] if isinstance(v, list) else function(v) for v in values]


@given(data=st.data())
@settings(max_examples=30)
def test_values_and_gradients_are_the_formula(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    factors = data.draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize < 4 else dtype]))
    values, ranks = values_of(data.draw, dtype, factors)
    gm = joint_of(values, ranks)
    result = share(gm, Context())
    gm.graph.lint()
    count = len(ranks)
    found = ops(gm)
    assert found["lora_shrink"] == found["lora_factor_grads"] == 1
    assert found["lora_expand"] == count and result.refused == [] and "lora_linear" not in found
    if values[0].is_contiguous():  # the sum of gradients has the layout of x
        assert found["lora_input_grads"] == 1 and "lora_input_grad" not in found
    assert found["lora_factor_grad"] == count, "those of the second factors"
    outs, grads = gm(*values)
    wants = formula(*mapped(lambda t: t.double(), values))
    sizes = formula(*mapped(lambda t: t.double().abs(), values))
    flat = [t for v in values for t in (v if isinstance(v, list) else [v])]
    for i, (got, want, size) in enumerate(zip([*outs, *grads], wants, sizes, strict=True)):
        # One sum over the ranks of all sites, and one a site over x: as many roundings as sites more.
        assert_within(got, want, count * rounding_bound(size, flat, dtype), f"value {i}")


def graph_of(model, batch):
    model(**batch).loss.backward()
    (graph,) = model.adaptc.graphs
    return graph


SHARED = hosts.slowly(["llama", "bert", "t5", "gpt2"], [[3, 2], [3], None, []], also=["gpt2", "bert"])


@pytest.mark.parametrize("host, groups", SHARED)
def test_who_shares(host, groups):
    base = hosts.short(host, train=True, **({"num_decoder_layers": 2} if host == "t5" else {}))
    batch = hosts.batch(host)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    check_against_reference(model, base, batch)
    found = []
    for graph in model.adaptc.graphs:
        if "share" in graph.stages:
            gm = graph.graph_module("share")
            target = dialect.get("lora_shrink").overload
            found += [len(n.args[1]) for n in gm.graph.find_nodes(op="call_function", target=target)]
    if host == "t5":  # gates; q, k, v of each attention; all keys and values of cross-attention read the encoder
        assert sorted(found) == [2, 2, 2, 3, 3, 3, 4]
    else:
        assert found == groups


class Readers(nn.Module):
    """Two layers that read one tensor, which is written to in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(x)
        first = self.a(h)
        h.mul_(2)
        return first.sum() + self.b(h).square().sum()


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_write_between_two_readers_is_seen(backend):
    """In a forward only: autograd itself refuses a write to what an adapter keeps for its backward."""
    base = Readers().double()
    model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend, adapter_dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        got = model(x)
        W = {s.path: base.get_submodule(s.path).weight + s.adapters["default"].delta() for s in model.adaptc.sites}
        h = torch.tanh(x)
        want = (h @ W["a"].T + base.a.bias).sum() + (2 * h @ W["b"].T + base.b.bias).square().sum()
    torch.testing.assert_close(got, want)
    if backend == "aot_eager":  # Inductor's code may come from its cache
        (graph,) = model.adaptc.graphs
        assert "lora_shrink" not in ops(graph.graph_module("share")), "they read two values"
        assert ops(graph.graph_module("fuse"))["lora_linear_expand"] == 2


def dropped(targets, verify=False, backend="aot_eager", passes=None, **options):
    lora = adaptc.LoRA(r=3, dropout=0.3, targets=targets, init="random")
    plan = adaptc.Plan([lora], passes=passes)
    torch.manual_seed(0)
    return adaptc.compile(hosts.short("llama", train=True), plan, backend=backend, verify=verify, **options)


@pytest.mark.parametrize("targets", [
    pytest.param(["q_proj", "k_proj"], marks=pytest.mark.slow), pytest.param(["o_proj"], marks=pytest.mark.slow),
    "all-linear",
])  # fmt: skip
def test_dropouts_become_part_of_the_products(targets):
    """Every site has a mask of its own; what they read is read once."""
    model = dropped(targets, verify="raise")
    gm = graph_of(model, hosts.batch("llama")).graph_module("share")
    found = ops(gm)
    assert "seeded_dropout" not in found and "lora_linear" not in found and "lora_input_grad" not in found
    groups = {"o_proj": [1], "q_proj": [2]}.get(targets[0], [3, 1, 2, 1])
    shrinks = gm.graph.find_nodes(op="call_function", target=dialect.get("lora_shrink").overload)
    assert [len(n.args[3]) for n in shrinks] == groups
    assert all(len(set(n.args[3])) == len(n.args[3]) and set(n.args[4]) == {0.3} for n in shrinks)
    assert found["lora_factor_grads"] == found["lora_shrink"] == len(groups)
    assert found["lora_factor_grad"] == sum(groups), "those of the second factors"


class Noisy(nn.Module):
    """A dropout of the base model in front of an adapted layer, and a sum that nothing else keeps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = torch.nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training)
        return self.second(h + torch.sin(h)).square().sum()


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_what_is_made_again_in_the_backward_has_the_masks_that_it_had(dtype):
    """The derivative along one direction by differences, under equal seeds: in fp32 the kernels run."""
    torch.manual_seed(0)
    lora = adaptc.LoRA(r=3, dropout=0.3, targets="all-linear", init="random")
    model = adaptc.compile(Noisy().to(dtype), lora, backend="inductor", adapter_dtype=dtype)
    x = torch.randn(7, 6, dtype=dtype, requires_grad=True)
    parameters = [x, *model.adaptc.parameters()]

    def loss(seed):
        torch.manual_seed(seed)
        return model(x)

    for seed in range(3):
        for parameter in parameters:
            parameter.grad = None
        loss(seed).backward()
        directions = [torch.randn_like(p) for p in parameters]
        along = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
        step = 1e-3 if dtype == torch.float32 else 1e-6
        ends = []
        for sign in (1, -1):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=sign * step)
            # With gradients: the graph of a training step.
            ends.append(float(loss(seed)))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=-sign * step)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, rel=2e-2 if dtype == torch.float32 else 1e-5)


def test_the_masks_are_those_of_the_dropouts():
    """The same step with and without the pass: one seed, the same masks, in the forward and in the backward."""
    found = []
    for passes in (None, {"skip": ["share"]}):
        model = dropped("all-linear", passes=passes)
        torch.manual_seed(3)
        loss = model(**hosts.batch("llama")).loss
        loss.backward()
        found.append((loss.detach(), *(p.grad for p in model.adaptc.parameters())))
    for got, want in zip(*found, strict=True):
        assert float(want.abs().max()) > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_factors_that_are_made_late_are_not_waited_for():
    """Two adapters live on k_proj are one node whose factors are joined where it stands, behind q_proj."""
    base = hosts.short("llama", train=True)
    lora = adaptc.LoRA(r=3, init="random", targets=["q_proj", "k_proj", "v_proj"])
    model = adaptc.compile(base, lora, name="a", backend="aot_eager")
    model.adaptc.add("b", adaptc.LoRA(r=2, init="random", targets=["k_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewSignatureWarning)
        model.adaptc.switch(["a", "b"])
    reports = [r for r in graph_of(model, hosts.batch("llama")).reports if r.name == "share"]
    reason = "its first factor is made after another site reads the same value"
    assert ("model.layers.0.self_attn.k_proj", reason) in reports[0].result.refused


def test_a_group_is_shared_whole_or_not_at_all():
    values = [torch.randn(2, 5), [torch.randn(2, n) for n in (3, 4)], [torch.randn(n, 5) for n in (3, 4)]]
    factors = [torch.randn(2, 5)] * 2, [torch.randn(n, 2) for n in (3, 4)], [torch.ones(1).double()] * 2
    for budget, shrinks in ((2, 0), (3, 1)):
        gm = joint_of((*values, *factors), [2, 2])
        result = share(gm, Context(budget=budget))
        assert ops(gm).get("lora_shrink", 0) == shrinks
        assert ("(unknown site)", "limit reached") in result.refused
        assert len(result.applied) <= budget


def test_verified_it_holds():
    model = adaptc.compile(hosts.short("llama", train=True), LORA, backend="aot_eager", verify="raise")
    (report,) = [r for r in graph_of(model, hosts.batch("llama")).reports if r.name == "share"]
    assert report.result.applied and report.errors is not None


def swapped_factors(gm, context):
    result = share(gm, context)
    for rewrite in result.applied:
        for graph in (gm.graph, rewrite.after.graph if rewrite.after else gm.graph):
            for node in graph.find_nodes(op="call_function", target=dialect.get("lora_shrink").overload):
                node.args = (node.args[0], node.args[1][::-1], *node.args[2:])
    gm.recompile()
    return result


def one_term_lost(gm, context):
    result = share(gm, context)
    for rewrite in result.applied:
        for graph in (gm.graph, rewrite.after.graph if rewrite.after else gm.graph):
            for node in graph.find_nodes(op="call_function", target=dialect.get("lora_input_grads").overload):
                node.args = (node.args[0], node.args[1][:1], node.args[2][:1], *node.args[3:])
    gm.recompile()
    return result


@pytest.mark.parametrize("wrong", [swapped_factors, one_term_lost])
def test_a_wrong_pass_is_found(wrong, monkeypatch):
    real = manager.get

    def get(name):
        one = real(name)
        return manager.Pass(name, wrong, one.contract) if name == "share" else one

    monkeypatch.setattr(manager, "get", get)
    model = adaptc.compile(hosts.short("llama", train=True), LORA, backend="aot_eager", verify="raise")
    with pytest.raises(Exception, match="after pass share") as error:
        model(**hosts.batch("llama")).loss.backward()
    causes = [error.value, error.value.__cause__, getattr(error.value, "inner_exception", None)]
    assert any(isinstance(cause, VerifyError) for cause in causes)


def seeded(bounds, reads=True):
    """Dropouts of one x, each with a seed of its own, as AOTAutograd writes them."""

    def step(x):
        seeds = [torch.randint(*bound, (1,)) for bound in bounds]
        drop = dialect.get("seeded_dropout").overload
        return [drop(x, seed, 0.4) for seed in seeds] + ([] if reads else seeds)

    return make_fx(step, tracing_mode="fake")(torch.randn(3, 9))


BOUND = (2**62,)


@pytest.mark.parametrize("bound", [BOUND, (0, 2**62)], ids=["default", "low"])
def test_seeds_are_drawn_together_and_are_the_same(bound):
    x = torch.randn(3, 9)
    plain, gm = seeded([bound] * 3), seeded([bound] * 3)
    result = share(gm, Context())
    assert len(result.applied) == 1 and ops(gm)["randint"] == 1 and ops(plain)["randint"] == 3
    for i in range(20):
        torch.manual_seed(i)
        want = plain(x)
        state = torch.get_rng_state()
        torch.manual_seed(i)
        assert all(torch.equal(a, b) for a, b in zip(gm(x), want, strict=True))
        assert torch.equal(torch.get_rng_state(), state), "what is drawn afterwards is the same too"


def test_only_seeds_are_drawn_together():
    assert share(seeded([BOUND]), Context()).applied == []
    assert share(seeded([BOUND] * 2, reads=False), Context()).applied == []
    assert share(seeded([BOUND, (2**61,)]), Context()).applied == [], "drawn from different ranges"
    stopped = share(seeded([BOUND] * 2), Context(budget=0))
    assert stopped.applied == [] and [reason for _, reason in stopped.refused] == ["limit reached"] * 2


def kept_between(function, *inputs):
    """The targets of what the backward makes again, in a graph of one adapter that reads what ``function`` makes."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.gate, self.down = (torch.nn.Linear(6, 8, bias=False) for _ in range(3))
            self.down = torch.nn.Linear(8, 6, bias=False)

        def forward(self, x):
            return self.down(function(self.gate(x), self.up(x)))

    net = Net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    model = adaptc.compile(net, adaptc.LoRA(r=2, targets=["down"], init="random"), backend="aot_eager")
    model(torch.randn(3, 6).requires_grad_()).sum().backward()
    (graph,) = model.adaptc.graphs
    gm = graph.graph_module("share")
    return [n.target for n in gm.graph.nodes if n.meta.get("recompute") is not None]


def test_what_a_loop_makes_for_an_adapter_alone_is_made_again():
    assert kept_between(lambda gate, up: gate.sin() * up)[-1] is torch.ops.aten.mul.Tensor
    assert not kept_between(lambda gate, up: torch.tanh(gate + up)), "the base's own backward reads it"
    assert not kept_between(lambda gate, up: gate + up), "two tensors of its size are not kept for others"


class Writes(torch.nn.Module):
    """Reads a buffer, or its input, in a loop before it writes to it."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.what = nn.Linear(6, 6), nn.Linear(6, 6), what
        self.register_buffer("c", torch.full((3, 6), 1.5))

    def forward(self, x):
        if self.what == "a buffer":
            h = x * self.c
            self.c.add_(x)
        else:
            h = torch.relu(x)
            x.mul_(3)
        return self.q(h) * 2 + self.k(h)


@pytest.mark.parametrize("what", ["a buffer", "its input"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_what_reads_a_tensor_that_the_forward_writes_to_is_kept(what, dropout):
    base, found = Writes(what), []
    for backend in ("eager", "aot_eager"):
        torch.manual_seed(1)
        lora = adaptc.LoRA(r=2, init="random", targets="all-linear", dropout=dropout)
        model = adaptc.compile(copy.deepcopy(base), lora, backend=backend)
        model(torch.linspace(-1, 2, 18).view(3, 6).clone()).square().sum().backward()
        found.append([p.grad for p in model.adaptc.parameters()])
    assert all(torch.allclose(got, want, rtol=1e-5, atol=1e-6) for got, want in zip(*found, strict=True))
