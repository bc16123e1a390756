"""fuse: a site's products with its frozen layer's as one op, and the base model's nodes again behind lower."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

import adaptc
from adaptc.codegen.cost import saved_bytes, shares
from adaptc.codegen.cpp import takes
from adaptc.codegen.ops import lora_fused
from adaptc.errors import VerifyError
from adaptc.ir import dialect
from adaptc.ir.names import module_of, op_name
from adaptc.ir.sites import is_inserted
from adaptc.passes import manager
from adaptc.passes.contract import Context
from adaptc.passes.fuse import fuse
from adaptc.passes.lower import lower
from adaptc.passes.share import share
from adaptc.torch_internals import is_backward
from tests.models import hosts
from tests.passes.graphs import ops
from tests.passes.models import adapted, trained_graph
from tests.reference import check_against_reference, check_steps_agree, loss_of

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
VIEWS = ("view", "_unsafe_view")
PLAIN = {"skip": ["fuse"]}
aten = torch.ops.aten


class Gated(nn.Module):
    """Two layers that read one value whose gradient is asked for, one in front of them and one behind."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.first, self.down = nn.Linear(6, 8), nn.Linear(10, 5)
        self.gate, self.up = nn.Linear(8, 10, bias=False), nn.Linear(8, 10, bias=False)
        self.checkpointed = checkpointed

    def block(self, x):
        h = torch.tanh(self.first(x))
        return self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


SITES, REWRITES = 4, 4 + 4 + 2  # nothing asks for the gradient of the first layer's input


def gated(passes=None, *, dtype=torch.float32, backend="aot_eager", verify=False, checkpointed=False, dynamic=None,
          **options):  # fmt: skip
    torch.manual_seed(0)
    base = Gated(checkpointed).to(dtype)
    method = adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": "all-linear", **options})
    return adaptc.compile(
        base, adaptc.Plan([method], passes=passes), backend=backend, verify=verify, dynamic=dynamic,
        adapter_dtype=dtype if dtype == torch.float64 else None,
    )  # fmt: skip


def step(model):
    """Loss and gradients by name, and the graph with the sites."""
    torch.manual_seed(1)
    x = torch.randn(2, 7, 6).to(model.first.weight.dtype)
    loss = loss_of(model(x))
    loss.backward()
    (graph,) = [g for g in model.adaptc.graphs if g.sites]
    return (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), graph


def report_of(graph, name="fuse"):
    return next(report for report in graph.reports if report.name == name)


def calls(gm, base=True):
    """Every call of the base model's nodes, or the adapters' too: op, shape and what a checkpoint does with it."""
    return [
        (op_name(n), getattr(n.meta["val"], "shape", None), is_inserted(n), is_backward(n),
         str(n.meta.get("recompute")), "ac_graph_id" in n.meta, (module_of(n) or [None])[0])
        for n in gm.graph.nodes
        if n.op == "call_function" and op_name(n) not in (*VIEWS, "sym_size") and not (base and is_inserted(n))
    ]  # fmt: skip


def test_every_site_of_a_small_model():
    base, model = adapted(verify="raise")
    graph = trained_graph(model)
    report = report_of(graph)
    assert (len(report.result.applied), report.result.refused) == (5, []) and report.errors is not None
    # Two outputs, both their bottlenecks; nothing asks for the gradient of the first one's input.
    assert {k: v for k, v in ops(graph.graph_module("fuse")).items() if k.startswith(("lora", "mm", "addmm"))} == {
        "lora_shrink": 2, "lora_linear_expand": 2, "lora_bottleneck_grads": 2, "lora_factor_grad": 2,
        "lora_linear_input_grads": 1, "addmm": 1, "mm": 1,
    }  # fmt: skip
    up, down = graph.graph_module("fuse").graph.find_nodes(
        op="call_function", target=dialect.get("lora_linear_expand").overload
    )
    assert up.args[2] is not None and down.args[2] is None, "a layer with a bias, and one without"
    check_against_reference(model, base, torch.randn(2, 7, 6))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_layers_that_read_one_value(dropout):
    """Against the ops as they are in fp64, which are tested against their formulas: masks are functions of seeds."""
    model = gated(verify="raise", dropout=dropout)
    reference = gated({"skip": ["share", "fuse", "lower"]}, dtype=torch.float64, dropout=dropout)
    for exact, ours in zip(reference.adaptc.parameters(), model.adaptc.parameters(), strict=True):
        exact.data.copy_(ours.data)
    got, graph = step(model)
    report = report_of(graph)
    assert (len(report.result.applied), report.result.refused) == (REWRITES, []) and max(report.errors) < 1e-5
    gm = graph.graph_module("fuse")
    lists = [n.args for n in gm.graph.nodes if op_name(n) == "lora_linear_input_grads"]
    assert sorted([len(one[0]), len(one[2]), len(one[4])] for one in lists) == [
        [n, n, n if dropout else 0] for n in (1, 2)
    ]
    want, _ = step(reference)
    check_steps_agree(got, want, loss=1e-5, gradient=1e-5)


def test_q_k_and_v():
    model = adaptc.compile(
        hosts.short("llama", train=True), adaptc.LoRA(r=3, init="random", targets="all-linear"), backend="aot_eager"
    )
    model(**hosts.batch("llama")).loss.backward()
    (graph,) = model.adaptc.graphs
    report = report_of(graph)
    # Those of q, k and v read what needs no gradient.
    assert (len(report.result.applied), report.result.refused) == (7 + 7 + 3, [])


SAME = {
    "plain": {}, "dropout": {"dropout": 0.1}, "DoRA": {"dora": True}, "a bias": {"lora_bias": True},
    "checkpointed": {"checkpointed": True}, "checkpointed, dropout": {"checkpointed": True, "dropout": 0.1},
    "symbolic sizes": {"dynamic": True}, "bf16": {"dtype": torch.bfloat16}, "a budget": {},
}  # fmt: skip


SLOW = ("symbolic sizes", "bf16", "a bias", "a budget", "checkpointed")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SAME])
def test_behind_lower_it_is_the_step_that_it_was(name, monkeypatch):
    """To the bit where an op has no kernel; the base model's nodes are its own and in their order, and the backward
    keeps what it kept."""
    monkeypatch.setattr(lora_fused, "stays", lambda *args: False)
    (got, graph), (want, plain) = (
        step(gated(passes, **SAME[name])) for passes in ({"limit": {"fuse": 5}} if name == "a budget" else None, PLAIN)
    )
    assert report_of(graph).result.applied and "fuse" not in plain.stages
    assert torch.equal(got[0], want[0]) and got[1].keys() == want[1].keys()
    assert all(torch.equal(got[1][n], want[1][n]) for n in want[1])
    new, old = (g.graph_module(g.stages[-1]) for g in (graph, plain))
    assert calls(new) == calls(old)
    everything = [collections.Counter(map(str, calls(gm, base=False))) for gm in (new, old)]
    assert everything[0] == everything[1]
    assert shares(new) == shares(old)
    assert saved_bytes(*graph.parts) == saved_bytes(*plain.parts)


def test_checkpoint_marks_are_kept():
    _, graph = step(gated(checkpointed=True))
    for stage, names in (("fuse", ("lora_linear_expand",)), ("lower", ("mm", "addmm"))):
        nodes = [n for n in graph.graph_module(stage).graph.nodes if op_name(n) in names and not is_backward(n)]
        marked = [n for n in nodes if "recompute" in n.meta and "ac_graph_id" in n.meta]
        assert len([n for n in marked if stage == "fuse" or not is_inserted(n)]) == SITES, "the frozen products"


def test_dora_and_biases_follow_as_nodes_of_their_own():
    for options, expected in (({"dora": True}, "dora_rescale"), ({"lora_bias": True}, "add")):
        _, graph = step(gated(**options))
        gm = graph.graph_module("fuse")
        outputs = [n for n in gm.graph.nodes if op_name(n) == "lora_linear_expand"]
        assert len(outputs) == SITES and report_of(graph).result.refused == []
        assert all([op_name(user) for user in n.users if not is_backward(user)] == [expected] for n in outputs)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_graph_without_a_backward(backend):
    model = gated(backend=backend)
    with torch.no_grad():
        got = model(torch.ones(2, 7, 6))
        (graph,) = model.adaptc.graphs
        assert ops(graph.graph_module("fuse"))["lora_linear_expand"] == SITES
        assert "lora_linear_expand" not in ops(graph.graph_module("lower"))
        torch.testing.assert_close(got, gated(PLAIN)(torch.ones(2, 7, 6)))


@pytest.mark.inductor
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"dropout": 0.1}, id="dropout", marks=pytest.mark.slow),
        pytest.param({"dora": True}, id="DoRA"),
    ],
)
def test_inductor_makes_as_many_results_in_place(options):
    """With DoRA a loop that reads such a result is run with loops of other shapes: not before the result is there."""
    (got, graph), (want, plain) = (step(gated(passes, backend="inductor", **options)) for passes in (None, PLAIN))
    assert graph.in_place == plain.in_place > 0
    new, old = (g.graph_module(g.stages[-1]) for g in (graph, plain))
    assert calls(new) == calls(old) and graph.stages[-1] == "library"
    check_steps_agree(got, want)


def test_activations_are_not_cast_for_factors_in_fp32():
    """No tensor of M x K or M x N changes its dtype between the base's bf16 and the adapters' fp32."""
    _, model = adapted(dtype=torch.bfloat16)
    graph = trained_graph(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    casts = [n for n in graph.graph_module("lower").graph.nodes if op_name(n) in ("convert_element_type", "_to_copy")]
    rows, rank = 14, 4
    assert casts and not [n for n in casts if n.meta["val"].numel() > max(rows * rank, 10 * rank)]


# -- graphs written by hand ----------------------------------------------------------------------------


def graph_of(function, *values, shared=True):
    gm = make_fx(function, tracing_mode="fake")(*values)
    if shared:
        share(gm, Context())
    return gm


def operands():
    torch.manual_seed(0)
    shapes = {"x": (4, 5), "w": (3, 5), "bias": (3,), "A": (2, 5), "B": (3, 2)}
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes.values()] + [torch.tensor([1.5]).double()]


def linear(x, y, A, B, s, scale_at="r"):
    return dialect.get("lora_linear").overload(x, y, A, B, s, scale_at)


REFUSED = {
    "its frozen layer's output is read by others too":
        lambda x, w, b, A, B, s: (y := x @ w.t(), linear(x, y, A, B, s)[0]),
    "its scale multiplies the output and not the bottleneck":
        lambda x, w, b, A, B, s: [linear(x, x @ w.t(), A, B, s, "n")[0]],
    "its frozen layer multiplies by what is computed: a weight that is dequantised, or has an update":
        lambda x, w, b, A, B, s: [linear(x, x @ (2 * w).t(), A, B, s)[0]],
    "its frozen layer is no product with a weight, but ends in sin":
        lambda x, w, b, A, B, s: [linear(x, (x @ w.t()).sin(), A, B, s)[0]],
    "its frozen layer is no product with a weight, but ends in an input of the graph":
        lambda x, w, b, A, B, s: [linear(x, x, A, A.t(), s)[0]],
    "its frozen layer adds another tensor than a bias":
        lambda x, w, b, A, B, s: [linear(x, torch.addmm(x[:, :3] * 2, x, w.t()), A, B, s)[0]],
    "another op of an adapter stands between it and its frozen layer":
        lambda x, w, b, A, B, s: [linear(x, linear(x, x @ w.t(), A, B, s, "n")[0], A, B, s)[0]],
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_left_as_it_was_says_why(reason):
    values = operands()
    gm = graph_of(REFUSED[reason], *values, shared=False)
    before = ops(gm)
    result = fuse(gm, Context())
    assert ("(unknown site)", reason) in result.refused and result.applied == []
    assert ops(gm) == before


def test_a_product_that_reads_the_bottleneck_too_is_no_frozen_layer():
    """x and y are one node: it is read twice by one reader."""
    x, w, _, A, B, s = operands()
    square = torch.randn(5, 5, dtype=torch.float64)

    def twice(x, w, A, B, s):
        y = x @ w
        return linear(y, y, A, B, s)[0]

    result = fuse(graph_of(twice, x, square, A, A.t().contiguous(), s, shared=False), Context())
    assert [reason for _, reason in result.refused] == ["its frozen layer's output is read by others too"]


@pytest.mark.parametrize("theirs, ours, fused", [
    (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE, False),
    (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_SAVE, True),
    (CheckpointPolicy.MUST_SAVE, None, True),
])  # fmt: skip
def test_what_a_checkpoint_treats_in_two_ways_stays_two(theirs, ours, fused):
    gm = graph_of(lambda x, w, b, A, B, s: linear(x, torch.addmm(b, x, w.t()), A, B, s)[0], *operands(), shared=False)
    (product,) = [n for n in gm.graph.nodes if op_name(n) == "addmm"]
    (site,) = [n for n in gm.graph.nodes if op_name(n) == "lora_linear"]
    product.meta.update(recompute=theirs, ac_graph_id=3)
    if ours is not None:
        site.meta.update(recompute=ours, ac_graph_id=3)
    result = fuse(gm, Context())
    assert len(result.applied) == fused and len(result.refused) == (not fused)
    lower(gm, Context())
    (product, _) = [n for n in gm.graph.nodes if op_name(n) == "addmm"]
    assert (product.meta["recompute"], product.meta["ac_graph_id"]) == (theirs, 3) and not is_inserted(product)


def two_parts(x, g, w, v, q, A, s):
    """The gradient of an input through a frozen layer and a pass of its own."""
    total = g @ w + (x.cos() if s is None else g @ v)
    return dialect.get("lora_input_grads").overload(total, [q], [A], [], [])


def test_a_gradient_with_another_part_stays_whole():
    """A sum that ``share`` did not write is no sum of frozen layers' products."""
    x, w, _, A, B, s = operands()
    g, q = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    for last in (None, s):
        gm = graph_of(two_parts, x, g, w, w.clone(), q, A, last, shared=False)
        result = fuse(gm, Context())
        assert result.applied == [] and [reason for _, reason in result.refused] == [
            "the gradient of its input is not made of products with frozen weights alone, or others read these"
        ]


@pytest.mark.parametrize("budget", [0, 3, 9])
def test_a_limit_is_kept(budget):
    model = gated({"limit": {"fuse": budget}})
    got, graph = step(model)
    result = report_of(graph).result
    assert len(result.applied) == budget and len(result.refused) == REWRITES - budget
    assert {reason for _, reason in result.refused} == {"limit reached"}


def test_products_stand_where_they_stood():
    """Of gate and up the frozen products are made one by one, each when its gradient is there, and not at the sum."""
    _, graph = step(gated(targets=["first", "gate", "up"]))
    _, plain = step(gated(PLAIN))

    def order(graph):
        gm = graph.graph_module("lower")
        names = ("mm", "addmm", "silu", "silu_backward", "mul", "tanh_backward")
        return [(op_name(n), n.meta["val"].shape) for n in gm.graph.nodes if op_name(n) in names and not is_inserted(n)]

    assert order(graph) == order(plain)


@pytest.mark.slow
def test_the_step_holds_where_nothing_is_lowered():
    """The fused ops run as they are, under a checkpoint too."""
    for checkpointed in (False, True):
        got, graph = step(gated({"skip": ["lower"]}, dropout=0.1, checkpointed=checkpointed))
        assert "lora_linear_expand" in ops(graph.graph_module(graph.stages[-1]))
        want, _ = step(gated(PLAIN, dropout=0.1))
        check_steps_agree(got, want)


# -- wrong passes are found ----------------------------------------------------------------------------


def wrong(name, change):
    """The pass, with the arguments of the op called ``name`` changed in what it wrote and in what it recorded."""

    def run(gm, context):
        result = fuse(gm, context)
        graphs = [gm.graph, *(r.after.graph for r in result.applied if r.after is not None)]
        for graph in graphs:
            for node in graph.find_nodes(op="call_function", target=dialect.get(name).overload):
                node.args = change(node.args)
        gm.recompile()
        return result

    return run


WRONG = {
    "a bias is lost": wrong("lora_linear_expand", lambda a: (*a[:2], None, *a[3:])),
    "dropout is lost": wrong("lora_linear_input_grads", lambda a: (*a[:4], [], [])),
    "a rate is another": wrong("lora_linear_input_grads", lambda a: (*a[:5], [0.2] * len(a[5]))),
    "a part is lost": wrong("lora_linear_input_grads", lambda a: (a[0][:1], a[1][:1], *a[2:])),
    "parts are swapped": wrong("lora_linear_input_grads", lambda a: (*a[:2], a[2][::-1], a[3], *a[4:])),
}


#: Op -> a body in which something is missing.
WRONG_BODIES = {
    "lora_bottleneck_grads": lambda body: lambda grad, h, B, s, dtype: body(grad, h, B, torch.ones_like(s), dtype),
    "lora_linear_expand": lambda body: lambda x, right, bias, h, B: body(x, right, bias, 2 * h, B),
    "lora_linear_input_grads": lambda body: lambda grad, right, q, A, *rest: body(grad, right, q, A[::-1], *rest),
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_a_wrong_body_is_found(name, monkeypatch):
    op = dialect.get(name)
    monkeypatch.setattr(op, "body", WRONG_BODIES[name](op.body))
    with pytest.raises(Exception, match="after pass fuse"):
        step(gated(verify="raise"))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pass_is_found(name, monkeypatch):
    real = manager.get

    def get(wanted):
        one = real(wanted)
        return manager.Pass(wanted, WRONG[name], one.contract) if wanted == "fuse" else one

    monkeypatch.setattr(manager, "get", get)
    with pytest.raises(Exception, match="after pass fuse") as error:
        step(gated(verify="raise", dropout=0.1))
    causes = [error.value, error.value.__cause__, getattr(error.value, "inner_exception", None)]
    assert any(isinstance(cause, VerifyError) for cause in causes)


def test_both_readers_of_a_gradient_stay_one_op_where_a_kernel_takes_them(monkeypatch):
    """Without the kernel its body runs: the numbers are those of the products, but for the rounding to bf16."""
    found = {}
    for has_it in (True, False):
        monkeypatch.setattr(takes, "has_avx512_bf16", lambda has_it=has_it: has_it)
        found[has_it], graph = step(gated(dtype=torch.bfloat16))
        stays = [n for n in graph.graph_module("lower").graph.nodes if op_name(n) == "lora_bottleneck_grads"]
        assert len(stays) == (SITES if has_it else 0)
    check_steps_agree(found[True], found[False], loss=1e-6, gradient=2e-2)


def test_in_fp32_kernels_make_every_product_with_a_small_side_on_any_cpu(monkeypatch):
    """Those of a site that shares its input with no other too; for as many rows as the kernels are fast for."""
    found = {}
    for rows in (1, 128):
        monkeypatch.setattr(takes, "FEWEST_ROWS", rows)
        found[rows], graph = step(gated())
        nodes = graph.graph_module("lower").graph.nodes
        assert len([n for n in nodes if op_name(n) == "lora_bottleneck_grads"]) == (SITES if rows == 1 else 0)
        assert any(op_name(n) == "mm" and is_inserted(n) for n in nodes) == (rows > 1)
    check_steps_agree(found[1], found[128], loss=1e-6, gradient=1e-5)
