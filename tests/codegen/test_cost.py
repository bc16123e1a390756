"""The cost model against closed forms: floating-point operations, bytes read and written, bytes saved."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import adaptc
from adaptc.codegen import cost
from adaptc.codegen.cost import crossing_bytes, graph_cost, is_adapter, is_backward, node_cost, saved_bytes, shares
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost
from adaptc.ir.show import graph_text
from adaptc.ir.sites import is_anchor
from adaptc.methods.base import Adapter, Anchor, Method
from adaptc.torch_internals import storage_key, tree_leaves
from tests.passes.models import adapted, trained_graph

#: Batch, heads, rows, in, out, rank. No two are equal.
Z, H, M, K, N, R = 2, 3, 14, 5, 7, 4


def t(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def captured(fn, *tensors, **options):
    """The graph as Dynamo writes it."""
    graphs = []
    torch.compiler.reset()
    torch.compile(fn, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True, **options)(*tensors)
    (gm,) = graphs
    return gm


def aten(fn, *tensors):
    """The graph as AOTAutograd writes it."""
    return make_fx(fn, tracing_mode="fake")(*tensors)


def moved(inputs, outputs, flops=0):
    """The cost of ``flops`` operations on fp32 tensors of these numbers of elements."""
    return Cost(flops, 4 * sum(inputs), 4 * sum(outputs))


#: name -> (function, shapes, cost)
TORCH = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(Z, M, K), (N, K), (N,)],
               moved([Z * M * K, N * K, N], [Z * M * N], Z * M * N * (2 * K + 1))),
    "linear without bias": (lambda x, w: F.linear(x, w), [(M, K), (N, K)],
                            moved([M * K, N * K], [M * N], 2 * M * K * N)),
    "matmul": (lambda x, w: x @ w, [(Z, M, K), (K, N)], moved([Z * M * K, K * N], [Z * M * N], 2 * Z * M * K * N)),
    "mv": (lambda x, w: torch.mv(x, w), [(M, K), (K,)], moved([M * K, K], [M], 2 * M * K)),
    "dot": (lambda x, w: torch.dot(x, w), [(K,), (K,)], moved([K, K], [1], 2 * K)),
    "bmm": (lambda x, w: torch.bmm(x, w), [(Z, M, K), (Z, K, N)],
            moved([Z * M * K, Z * K * N], [Z * M * N], 2 * Z * M * K * N)),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [(N,), (M, K), (K, N)],
              moved([N, M * K, K * N], [M * N], M * N * (2 * K + 1))),
    "baddbmm": (lambda b, x, w: torch.baddbmm(b, x, w), [(Z, M, N), (Z, M, K), (Z, K, N)],
                moved([Z * M * N, Z * M * K, Z * K * N], [Z * M * N], Z * M * N * (2 * K + 1))),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [(Z, H, M, K), (Z, H, N, K), (Z, H, N, R)],
                  moved([Z * H * M * K, Z * H * N * K, Z * H * N * R], [Z * H * M * R], 2 * Z * H * M * N * (K + R))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b), [(Z, K, M), (N, K, 3), (N,)],
               moved([Z * K * M, N * K * 3, N], [Z * N * (M - 2)], Z * N * (M - 2) * (2 * K * 3 + 1))),
    "conv2d in groups": (lambda x, w: F.conv2d(x, w, groups=2), [(Z, 6, M, M), (8, 3, 3, 2)],
                         moved([Z * 6 * M * M, 8 * 3 * 6], [Z * 8 * (M - 2) * (M - 1)],
                               2 * Z * 8 * (M - 2) * (M - 1) * 3 * 6)),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w), [(Z, K, M), (K, N, 3)],
                         moved([Z * K * M, K * N * 3], [Z * N * (M + 2)], 2 * Z * K * M * N * 3)),
    "pointwise": (lambda x: torch.tanh(x), [(M, K)], moved([M * K], [M * K], M * K)),
    "operator": (lambda x, y: x / y, [(M, K), (K,)], moved([M * K, K], [M * K], M * K)),
    "one input read once": (lambda x: x * x, [(M, K)], moved([M * K], [M * K], M * K)),
    "number": (lambda x: 2 * x, [(M, K)], moved([M * K], [M * K], M * K)),
    "comparison": (lambda x, y: x > y, [(M, K), (M, K)], Cost(0, 2 * 4 * M * K, M * K)),
    "cast": (lambda x: x.to(torch.bfloat16), [(M, K)], Cost(0, 4 * M * K, 2 * M * K)),
    "clone": (lambda x: x.clone(), [(M, K)], moved([M * K], [M * K])),
    "reduction": (lambda x: x.sum(-1), [(M, K)], moved([M * K], [M])),
    "in place": (lambda x: torch.relu_(x.view(-1)), [(M, K)], moved([M * K], [M * K], M * K)),
    "views": (lambda x: x.view(-1).unsqueeze(0).transpose(0, 1)[:, 0].expand(3, -1), [(M, K)], Cost()),
    "einsum": (lambda x, w: torch.einsum("mk,nk->mn", x, w), [(M, K), (N, K)],
               moved([M * K, N * K], [M * N], 2 * M * K * N)),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_captured_ops(name):
    function, shapes, expected = TORCH[name]
    assert graph_cost(captured(function, *(t(*shape) for shape in shapes))) == expected


ATEN = ("linear without bias", "mv", "dot", "bmm", "addmm", "baddbmm", "conv1d", "conv2d in groups",
        "conv_transpose1d", "pointwise", "operator", "one input read once", "number", "comparison", "cast", "clone",
        "reduction", "views")  # fmt: skip


@pytest.mark.parametrize("name", ATEN)
def test_aten_ops(name):
    """The same functions in the form of a joint graph. Views are nodes of their own there, and free."""
    function, shapes, expected = TORCH[name]
    assert graph_cost(aten(function, *(t(*shape) for shape in shapes))) == expected


def test_attention_and_its_backward_in_aten():
    q, k, v = t(Z, H, M, K), t(Z, H, N, K), t(Z, H, N, K)

    def both(q, k, v, g):
        out = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), g)

    gm = aten(both, *(x.requires_grad_() for x in (q, k, v)), t(Z, H, M, K))
    costs = {str(n.target): node_cost(n).flops for n in gm.graph.nodes if "scaled_dot" in str(n.target)}
    one = 2 * Z * H * M * N * K  # a product of M x N or M x K results
    # forward: q k^T and p v; backward: q k^T again, then dp, dq, dk, dv
    assert sorted(costs.values()) == [2 * one, 5 * one]


def test_grouped_queries():
    """Every query head does its products, however many heads of keys there are."""
    gm = captured(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                  t(Z, 4, M, K), t(Z, 2, N, K), t(Z, 2, N, K))  # fmt: skip
    assert graph_cost(gm).flops == 2 * Z * 4 * M * N * 2 * K


def test_repeated_elements_are_in_memory_once():
    assert graph_cost(captured(lambda x, y: x.expand(M, K) + y, t(1, K), t(M, K))) == moved([K, M * K], [M * K], M * K)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_follow_the_dtype(dtype):
    cost = graph_cost(captured(F.linear, t(M, K, dtype=dtype), t(N, K, dtype=dtype)))
    assert cost == Cost(2 * M * K * N, (M * K + N * K) * dtype.itemsize, M * N * dtype.itemsize)


def test_an_op_that_is_not_known_moves_its_bytes():
    assert graph_cost(captured(lambda x: torch.cumsum(x, 0), t(M, K))) == moved([M * K], [M * K])


def test_a_node_without_known_values_costs_nothing():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.tanh, (graph.placeholder("x"),)))
    assert graph_cost(fx.GraphModule({}, graph)) == Cost()


# -- dialect ops ---------------------------------------------------------------------------------------


def dialect_costs(dtype=torch.float32, batch=(Z, M)):
    """name -> (arguments, cost by the formula); ``rows`` is what comes before the last dimension."""
    rows, e = math.prod(batch), dtype.itemsize
    x, y, A, B, s = t(*batch, K), t(*batch, N), t(R, K), t(N, R), t(1)
    q = t(*batch, R)
    x, y, q = (tensor.to(dtype) for tensor in (x, y, q))
    h, xs, ys, factors = rows * R * e, rows * K * e, rows * N * e, 4 * R * (K + N)
    both = 2 * rows * R * (K + N)
    return {
        # the product h B^T is written, and read again for the scaled sum
        "n": ("lora_linear", [x, y, A, B, s, "n"],
              Cost(both + 2 * rows * N, xs + ys + factors + h + 2 * ys, ys + h + 2 * ys, h)),
        # the bottleneck is written and read
        "r": ("lora_linear", [x, y, A, B, s, "r"],
              Cost(both + rows * R + rows * N, xs + ys + factors + h, ys + h, h)),
        "q": ("lora_bottleneck_grad", [y, B, s], Cost(2 * rows * N * R + rows * R, ys + 4 * N * R, h)),
        "dA": ("lora_factor_grad", [q, x, torch.float32], Cost(2 * rows * R * K, h + xs, 4 * R * K)),
        "dx": ("lora_input_grad", [q, A], Cost(2 * rows * R * K, h + 4 * R * K, xs)),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["n", "r", "q", "dA", "dx"])
def test_dialect_ops(case, dtype):
    name, args, expected = dialect_costs(dtype)[case]
    op = dialect.get(name)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    rest = args[len(tensors) :]
    assert op.cost(*args) == expected
    assert graph_cost(aten(lambda *tensors: op.overload(*tensors, *rest), *tensors)) == expected


@given(batch=st.lists(st.integers(1, 9), min_size=1, max_size=3), r=st.integers(1, 64), k=st.integers(1, 64),
       n=st.integers(1, 64))  # fmt: skip
def test_the_scale_in_the_bottleneck_never_costs_more_bytes(batch, r, k, n):
    args = [torch.empty(s, device="meta") for s in ((*batch, k), (*batch, n), (r, k), (n, r), (1,))]
    at_n, at_r = (dialect.get("lora_linear").cost(*args, at) for at in "nr")
    rows = math.prod(batch)
    assert at_n.read - at_r.read == at_n.written - at_r.written == 2 * rows * n * 4
    assert at_n.flops - at_r.flops == rows * (n - r)


# -- nested bodies, symbolic sizes ---------------------------------------------------------------------


def test_a_checkpointed_body_costs_what_it_contains():
    def block(x, w):
        return torch.tanh(x @ w)

    def checkpointed(x, w):
        return torch.utils.checkpoint.checkpoint(block, x, w, use_reentrant=False)

    gm = captured(checkpointed, t(M, K).requires_grad_(), t(K, N))
    assert sum(isinstance(m, fx.GraphModule) for m in gm.modules()) == 2
    assert graph_cost(gm) == graph_cost(captured(block, t(M, K), t(K, N))) == moved(
        [M * K, K * N, M * N], [M * N, M * N], 2 * M * K * N + M * N
    )  # fmt: skip


def test_of_two_branches_the_dearer_counts():
    def branches(x, w):
        return torch.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: (x @ w).tanh(), (x, w))

    gm = captured(branches, t(M, K), t(K, N))
    assert graph_cost(gm).flops == 2 * M * K * N + M * N


def test_only_the_picked_nodes_count_in_bodies_too():
    gm = captured(lambda x, w: torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(x @ w), x, use_reentrant=False),
                  t(M, K).requires_grad_(), t(K, N))  # fmt: skip
    assert graph_cost(gm, lambda n: n.target == torch.tanh) == moved([M * N], [M * N], M * N)


def test_symbolic_sizes_count_as_captured_and_add_no_guard():
    x, w = t(M, K), t(N, K)
    torch._dynamo.mark_dynamic(x, 0)
    gm = captured(lambda x, w: torch.tanh(F.linear(x, w)).view(-1, 1), x, w)
    symbolic = next(n for n in gm.graph.nodes if n.op == "call_function").meta["example_value"].shape[0]
    assert isinstance(symbolic, torch.SymInt)
    guards = symbolic.node.shape_env.guards
    before = len(guards)
    assert graph_cost(gm) == moved([M * K, N * K, M * N], [M * N, M * N], 2 * M * K * N + M * N)
    assert len(guards) == before


def test_an_anchor_of_symbolic_size_costs_its_reference_and_adds_no_guard():
    graphs = {}
    for dynamic in (True, False):
        model = adaptc.compile(nn.Sequential(nn.Linear(K, N)), adaptc.LoRA(r=R, targets="0"), backend="eager",
                               dynamic=dynamic)  # fmt: skip
        model(t(M, K))
        graphs[dynamic] = model.adaptc.graphs[0].graph_module("captured")
    sizes = [s for n in graphs[True].graph.nodes for v in tree_leaves(n.meta.get("example_value"))
             if isinstance(v, torch.Tensor) for s in v.shape if isinstance(s, torch.SymInt)]  # fmt: skip
    guards = sizes[0].node.shape_env.guards
    before = len(guards)
    # base with its bias; then x A^T B^T, the scaled product, the sum
    flops = M * N * (2 * K + 1) + 2 * M * R * (K + N) + 2 * M * N
    assert graph_cost(graphs[True]).flops == graph_cost(graphs[False]).flops == flops
    assert len(guards) == before


class Own(Method):
    """A method that is defined outside the package: y * factor (N,)."""

    kind = "own"

    def refusal(self, path, module):
        return None

    def build(self, path, module, *, dtype, site_id):
        return OwnAdapter(self, site_id)


class OwnAdapter(Adapter):
    def __init__(self, method, site_id):
        super().__init__(method, site_id)
        self.factor = nn.Parameter(torch.ones(N))

    def apply_to(self, module, x, y):
        return own_site(y, self.site_id, self.factor)


@torch.compiler.allow_in_graph
def own_site(y, site_id, factor):
    return y * factor


OWN = Anchor(own_site, lambda edit, y, site_id, factor: edit.call(operator.mul, y, factor))


def test_the_anchor_of_a_method_outside_the_package_is_an_adapter():
    model = adaptc.compile(nn.Sequential(nn.Linear(K, N)), Own(targets="0"), backend="eager")
    model(t(M, K))
    gm = model.adaptc.graphs[0].graph_module("captured")
    (node,) = [n for n in gm.graph.nodes if n.target is own_site]
    assert is_anchor(node) and is_adapter(node)
    assert shares(gm)["forward"].adapters == moved([M * N, N], [M * N], M * N)
    assert "%y:0 = own_site(" in graph_text(gm), "the site's output, as of any method"


def test_what_cannot_be_estimated_costs_nothing_and_is_told(caplog, monkeypatch):
    """A model must compile whatever can be said of its costs."""

    def fails(node):
        if node.target == torch.tanh:
            raise ZeroDivisionError
        return node_cost(node)

    monkeypatch.setattr(cost, "node_cost", fails)
    gm = captured(lambda x: torch.tanh(x).sin(), t(M, K))
    assert graph_cost(gm).flops == M * K
    assert "no cost estimate of" in caplog.text and "tanh" in caplog.text


def test_values_under_vmap_cost_what_one_sample_costs():
    gm = captured(torch.vmap(lambda x: x.sin().reshape(-1)), t(M, K))
    assert graph_cost(gm).flops == K


# -- forward and backward ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """One training step of norm, up (6 -> 10), gelu, down (10 -> 6), score (6 -> 3) on 14 rows, r = 4, fp32."""
    torch.manual_seed(0)
    return trained_graph(adapted()[1])


def test_shares_add_up_to_the_graph(step):
    for stage in ("joint", "lower"):
        gm = step.graph_module(stage)
        parts = [cost for share in shares(gm).values() for cost in (share.base, share.adapters)]
        assert sum(parts, Cost()) == graph_cost(gm)


def test_shares_of_a_step(step):
    found = shares(step.graph_module("joint"))
    pointwise = M * 6 + M * 10  # the residual sum and gelu; a norm is neither product nor pointwise
    base = M * 10 * (2 * 6 + 1) + 2 * M * 10 * 6 + M * 3 * (2 * 6 + 1)
    one_site = 2 * M * R * 16 + M * R
    assert found["forward"].base.flops == base + pointwise
    assert found["forward"].adapters.flops == 2 * one_site + M * 10 + M * 6
    # down: q, dA, dB, dx; up: q, dA, dB, and no dx
    q_down, q_up = 2 * M * 6 * R + M * R, 2 * M * 10 * R + M * R
    factors = 2 * (2 * M * R * 10 + 2 * M * R * 6)
    dx_down, gradient_sum = 2 * M * R * 10, M * 10
    assert found["backward"].adapters.flops == q_down + q_up + factors + dx_down + gradient_sum
    # through the score and through down; up's dx is not asked for
    assert found["backward"].base.flops == 2 * M * 3 * 6 + 2 * M * 6 * 10 + M * 10


def test_a_captured_graph_has_no_backward_share():
    gm = captured(lambda x, w: x @ w, t(M, K), t(K, N))
    found = shares(gm)
    assert list(found) == ["forward"]
    assert found["forward"].base == graph_cost(gm) and found["forward"].adapters == Cost()


def test_an_anchor_is_the_adapters_share():
    model = adaptc.compile(nn.Sequential(nn.Linear(K, N)), adaptc.LoRA(r=R, targets="0"), backend="eager")
    model(t(M, K))
    share = shares(model.adaptc.graphs[0].graph_module("captured"))["forward"]
    assert share.base.flops == M * N * (2 * K + 1)
    assert share.adapters.flops == 2 * M * R * (K + N) + 2 * M * N


def test_bytes_that_cross(step):
    """In the joint graph: gelu's input and output (M x 10), the input of up (M x 6), the two bottlenecks."""
    expected = 4 * (M * 10 + M * 10 + M * 6 + 2 * M * R)
    assert crossing_bytes(step.graph_module("joint")) == expected


def test_saved_bytes_across_the_cut(step):
    """What the backward part receives besides inputs and tangents, each memory once."""
    forward, backward = step.parts
    base, adapters = saved_bytes(forward, backward)
    inputs = {n.name for n in forward.graph.nodes if n.op == "placeholder"}
    made = {n.name: n for n in forward.graph.nodes}
    crossing = [n for n in backward.graph.nodes if n.op == "placeholder" and n.name in made and n.name not in inputs]
    memory = {storage_key(n.meta["val"]): n.meta["val"].numel() * 4 for n in crossing}
    parameters = {storage_key(made[name].meta["val"]) for name in inputs}
    assert base + adapters == sum(size for key, size in memory.items() if key not in parameters)
    # At least the two bottlenecks; they are the adapters'.
    assert adapters >= 4 * 2 * M * R


def hand_cut(forward_fn, backward_fn, *tensors):
    """A forward whose one output is what the backward part receives under the same name."""
    forward = aten(forward_fn, *tensors)
    kept = forward.graph.output_node().args[0]
    graph = fx.Graph()
    node = graph.placeholder(kept.name)
    node.meta["val"] = kept.meta["val"]
    graph.output(backward_fn(graph, node))
    return forward, fx.GraphModule({}, graph), kept


def user_of_an_adapter(graph, node):
    user = graph.call_function(torch.ops.aten.sin.default, (node,))
    user.meta["custom"] = {"adaptc": "fc"}
    return user


def user_of_the_base(graph, node):
    return graph.call_function(torch.ops.aten.sin.default, (node,))


def test_a_saved_value_is_the_adapters_when_only_they_read_it():
    forward, backward, _ = hand_cut(torch.tanh, user_of_an_adapter, t(M, K))
    assert saved_bytes(forward, backward) == (0, 4 * M * K)
    forward, backward, _ = hand_cut(torch.tanh, user_of_the_base, t(M, K))
    assert saved_bytes(forward, backward) == (4 * M * K, 0)


def test_a_saved_value_is_the_adapters_when_they_made_it():
    forward, backward, kept = hand_cut(torch.tanh, user_of_the_base, t(M, K))
    kept.meta["custom"] = {"adaptc": "fc"}
    assert saved_bytes(forward, backward) == (0, 4 * M * K)


def test_a_view_of_an_input_is_not_saved_again():
    forward, backward, _ = hand_cut(lambda x: x.t(), user_of_the_base, t(M, K))
    assert saved_bytes(forward, backward) == (0, 0)


def test_a_gradient_sum_is_the_adapters_when_it_adds_theirs(step):
    sums = [n for n in step.graph_module("joint").graph.nodes if n.meta.get("is_gradient_acc")]
    assert [is_adapter(n) for n in sums] and all(is_backward(n) for n in sums)
    down = next(n for n in sums if is_adapter(n))
    assert {is_adapter(n) for n in down.all_input_nodes} == {True, False}
