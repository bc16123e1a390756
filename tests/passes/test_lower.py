"""lower: dialect ops of the joint graph become ATen; what a training step computes, and what it does not.

That every lowering computes its op's body is tested beside the lowerings.
"""

from __future__ import annotations

import collections

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from adaptc.codegen.cost import is_backward
from adaptc.errors import PipelineError
from adaptc.ir import dialect
from adaptc.ir.edit import copy_graph_module
from adaptc.ir.sites import dialect_nodes, site_of
from adaptc.passes import manager
from adaptc.passes.contract import Context
from adaptc.passes.lower import lower
from tests.passes.graphs import ops
from tests.passes.models import adapted, trained_graph
from tests.reference import check_against_reference

aten = torch.ops.aten


def joint_graph(**options):
    _, model = adapted(**options)
    return copy_graph_module(trained_graph(model).graph_module("joint"))


def product_shapes(gm, part=lambda n: True):
    """Shape of every product's result -> how many there are."""
    products = [n for n in gm.graph.nodes if n.target in (aten.mm.default, aten.addmm.default) and part(n)]
    return collections.Counter(tuple(n.meta["val"].shape) for n in products)


def test_every_dialect_op_becomes_aten():
    gm = joint_graph(depth=2)
    # four sites: forward, q, dA, dB; dx for all but the first
    assert {k: v for k, v in ops(gm).items() if k.startswith("lora")} == {
        "lora_linear": 4, "lora_bottleneck_grad": 4, "lora_factor_grad": 8, "lora_input_grad": 3,
    }  # fmt: skip
    result = lower(gm, Context())
    assert (len(result.applied), result.refused, dialect_nodes(gm)) == (19, [], [])
    counts = collections.Counter(r.site for r in result.applied)
    assert counts == {"layers.0.up": 4, "layers.0.down": 5, "layers.1.up": 5, "layers.1.down": 5}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("depth", [1, 2])
def test_loss_and_gradients(depth, dropout):
    """Against y = x W^T + b + s (x A^T) B^T in fp64; with dropout in eval, where it does nothing."""
    base, model = adapted(depth, dropout=dropout)
    if dropout:
        model.eval()
        base.eval()
    check_against_reference(model, base, torch.randn(2, 7, 6))
    assert dialect_nodes(model.adaptc.graphs[0].graph_module("lower")) == []


def test_products_of_a_training_step():
    """M = 14, K = 6, N = 10, r = 4. No (10, 6) or (6, 10): no gradient of a frozen weight."""
    gm = joint_graph()
    lower(gm, Context())
    assert product_shapes(gm, lambda n: not is_backward(n)) == {
        (14, 10): 2, (14, 4): 2, (14, 6): 2, (14, 3): 1,  # base, bottleneck and correction of up, down; score
    }  # fmt: skip
    assert product_shapes(gm, is_backward) == {
        (14, 6): 1,  # through the score
        (14, 4): 2,  # q of down and up
        (4, 10): 1, (6, 4): 1,  # dA, dB of down
        (14, 10): 2,  # down's dx, through the base and through the adapter
        (4, 6): 1, (10, 4): 1,  # dA, dB of up; nobody asks for its dx
    }  # fmt: skip


def test_the_input_gradient_of_the_first_layer_is_computed_when_asked_for():
    _, model = adapted()
    x = torch.randn(2, 7, 6, requires_grad=True)
    model(x).sum().backward()
    gm = model.adaptc.graphs[0].graph_module("lower")
    assert product_shapes(gm, is_backward)[(14, 6)] == 3
    assert x.grad is not None


def test_frozen_adapters_have_no_gradient():
    _, model = adapted()
    for parameter in model.layers[0].down.adapters.parameters():
        parameter.requires_grad_(False)
    gm = trained_graph(model).graph_module("joint")
    sites = collections.Counter((site_of(n), n.target._schema.name) for n in dialect_nodes(gm) if is_backward(n))
    # down passes the gradient on to up, and makes none of its own
    assert sites[("layers.0.down", "adaptc::lora_factor_grad")] == 0
    assert sites[("layers.0.down", "adaptc::lora_input_grad")] == 1
    assert sites[("layers.0.up", "adaptc::lora_factor_grad")] == 2
    assert all(p.grad is None for p in model.layers[0].down.adapters.parameters())


def test_new_nodes_belong_to_their_site_and_their_phase():
    gm = joint_graph()
    phase = {n.name: (is_backward(n), site_of(n)) for n in dialect_nodes(gm)}
    result = lower(gm, Context())
    nodes = {n.name: n for n in gm.graph.nodes}
    for rewrite in result.applied:
        wanted = {phase[name] for name in rewrite.removed if name in phase}
        found = {(is_backward(nodes[name]), site_of(nodes[name])) for name in rewrite.added}
        assert found == wanted and len(wanted) == 1


def test_the_base_model_is_left_alone():
    gm = joint_graph()
    before = [n.name for n in gm.graph.nodes if site_of(n) == "(unknown site)"]
    result = lower(gm, Context())
    added = {name for r in result.applied for name in r.added}
    assert [n.name for n in gm.graph.nodes if site_of(n) == "(unknown site)" and n.name not in added] == before


def test_stops_at_its_limit():
    gm = joint_graph()
    before = len(dialect_nodes(gm))
    result = lower(gm, Context(budget=2))
    assert len(result.applied) == 2
    assert len(dialect_nodes(gm)) == before - 2
    assert [reason for _, reason in result.refused] == ["limit reached"] * (before - 2)
    assert {site for site, _ in result.refused} <= {"layers.0.up", "layers.0.down"}


def one_op():
    op = dialect.get("lora_input_grad").overload
    return make_fx(lambda q, A: op(q, A), tracing_mode="fake")(torch.randn(4, 2), torch.randn(2, 5))


def test_nested_bodies_are_lowered():
    body = one_op()
    graph = fx.Graph()
    q, A = graph.placeholder("q"), graph.placeholder("A")
    graph.output(graph.call_function(torch.ops.higher_order.cond, (True, graph.get_attr("body"), A, (q, A))))
    gm = fx.GraphModule({"body": body}, graph)
    result = lower(gm, Context())
    assert len(result.applied) == 1
    assert dialect_nodes(body) == []
    tensors = torch.randn(4, 2), torch.randn(2, 5)
    torch.testing.assert_close(body(*tensors), tensors[0] @ tensors[1])


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1), ()])
def test_outputs_that_nobody_reads(read):
    op = dialect.get("lora_linear").overload
    args = [torch.randn(s, dtype=torch.float64) for s in ((4, 5), (4, 3), (2, 5), (3, 2), (1,))]

    def call(*tensors):
        found = op(*tensors, "n")
        return [found[i] for i in read]

    gm = make_fx(call, tracing_mode="fake")(*args)
    assert len(dialect_nodes(gm)) == 1
    assert len(lower(gm, Context()).applied) == 1
    assert dialect_nodes(gm) == []
    x, y, A, B, s = args
    want = (y + s * (x @ A.T @ B.T), x @ A.T)
    torch.testing.assert_close(gm(*args), [want[i] for i in read])


def test_a_lowered_graph_cannot_be_lowered_again():
    one = manager.get("lower")
    copy = manager.Pass("again", one.run, one.contract)
    with pytest.raises(PipelineError, match="pass again cannot run on a graph that is aten"):
        manager.Pipeline([one, copy])
