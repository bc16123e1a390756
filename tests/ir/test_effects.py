"""Nodes that reads must not be moved across, on graphs as Dynamo writes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptc.ir.effects import barrier, may_write


def captured(fn, *inputs):
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm

    torch.compile(fn, backend=keep, fullgraph=True)(*inputs)
    (gm,) = graphs
    return gm


def calls(gm):
    return [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]


def item(x):
    x[0] = 1


def augmented_power(x):
    x **= 2


def augmented_matmul(x):
    x @= x


def out_argument(x):
    torch.add(x, 1, out=x)


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)


@torch.compiler.allow_in_graph
def opaque(x):
    return x.zero_()


WRITERS = {
    "method": lambda x: x.mul_(2),
    "method of a view": lambda x: x[0].mul_(2),
    "function": lambda x: torch.relu_(x),
    "dunder": lambda x: x.__imul__(2),
    "functional flag": lambda x: F.relu(x, inplace=True),
    "functional flag by position": lambda x: F.leaky_relu(x, 0.1, True),
    "module": nn.Hardtanh(inplace=True),
    "dropout": nn.Dropout(0.5, inplace=True).train(),
    "statistics": nn.BatchNorm1d(3).train(),
    "max norm": lambda x: F.embedding(torch.zeros(1, dtype=torch.long), x, max_norm=1.0),
    "item": item,
    "power": augmented_power,
    "matmul": augmented_matmul,
    "out": out_argument,
    "overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
    "packet": lambda x: torch.ops.aten.add_(x, 1),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "checkpoint": checkpointed,
    "opaque function": opaque,
}


@pytest.mark.parametrize("what", WRITERS)
def test_writers_are_seen(what):
    assert any(may_write(n) for n in calls(captured(WRITERS[what], torch.randn(3, 3)))), what


READERS = {
    "arithmetic": lambda x: (x + 1) * x @ x - x**2,
    "comparison": lambda x: (~(x > 0)) & (x < 1),
    "views": lambda x: x[0:1].t().reshape(-1).expand(2, 3),
    "functions": lambda x: F.layer_norm(F.silu(F.linear(x, x)), (3,)),
    "functional flag off": lambda x: F.relu(x, inplace=False) + F.leaky_relu(x, 0.1, False),
    "dropout": nn.Dropout(0.5).train(),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "casts": lambda x: x.to(torch.float64).float(),
    "overload": lambda x: torch.ops.aten.add.Tensor(x, 1),
    "packet": lambda x: torch.ops.aten.abs(x),
    "private names": lambda x: torch._C._nn.gelu(x),
}


@pytest.mark.parametrize("what", READERS)
def test_readers_are_let_through(what):
    gm = captured(READERS[what], torch.randn(3, 3))
    assert calls(gm) and not any(may_write(n) for n in gm.graph.nodes), what


def test_modules_hide_what_they_do():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(inplace=True)))
    (call,) = calls(gm)
    assert call.op == "call_module" and may_write(call)


def between(body):
    """The reason that lies between the first and the last node of ``body``."""
    nodes = calls(captured(body, torch.randn(3, 3)))
    return barrier(nodes[0], nodes[-1])


def grad_mode(x):
    a = torch.sin(x)
    with torch.no_grad():
        b = torch.cos(a)
    return torch.tan(b)


def autocast(x):
    a = torch.sin(x)
    with torch.autocast("cpu", torch.bfloat16):
        b = torch.cos(a)
    return torch.tan(b)


@pytest.mark.parametrize(
    "body, reason",
    [
        (lambda x: torch.sin(x).mul_(2).cos(), "mul_ may write to memory"),
        (grad_mode, "_set_grad_enabled switches a mode of torch"),
        (autocast, "_enter_autocast switches a mode of torch"),
        (lambda x: torch.sin(x).abs().cos(), None),
        (lambda x: torch.sin(x).cos_(), None),
    ],
    ids=["write", "grad mode", "autocast", "nothing", "the end itself"],
)
def test_barrier_names_the_node_in_between(body, reason):
    assert between(body) == reason
