"""``Function.apply`` as the target of a node: torch 2.14 makes it a builtin that fx cannot write by itself."""

from __future__ import annotations

import operator

import torch
from torch import fx

from adaptc.ir import show
from adaptc.ir.edit import Edit, copy_graph_module


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 5 * grad


def test_a_graph_with_it_is_printed_copied_and_run():
    gm = fx.symbolic_trace(lambda x: x + 1)
    (node,) = gm.graph.find_nodes(op="call_function", target=operator.add)
    node.meta["example_value"] = torch.ones(2)
    edit = Edit(gm, "site", [node], [node])
    edit.finish(edit.call(Tripled.apply, *node.args[:1]))
    gm.recompile()
    x = torch.tensor([2.0, 4.0], requires_grad=True)
    copied = copy_graph_module(gm)
    copied(x).sum().backward()
    assert copied(x).tolist() == [6, 12] and x.grad.tolist() == [5, 5]
    assert "Tripled_apply(@x)" in show.graph_text(gm)
