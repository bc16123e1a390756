"""canonicalise: its rewrites one after the other, on nested bodies too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc.ir.sites import lora_nodes
from adaptc.passes.canonicalise import canonicalise
from adaptc.passes.contract import Context
from adaptc.passes.insert import insert
from tests.passes.checks.wrong_passes import capture
from tests.passes.graphs import Graph, check_adapters, ops, tensors


def two_adapters(values, dtype):
    """Two adapters of one site as ``insert`` writes them on a bf16 base."""
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    for i, (a, b, s) in enumerate(((a1, b1, s1), (a2, b2, s2))):
        dropped = build.call(torch.nn.functional.dropout, x, 0.0, True)
        y = build.lora(dropped, y, build.call("to", a, dtype), build.call("to", b, dtype), s, site=f"fc.{i}")
    return build.module(y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rewrites_work_into_each_other(dtype):
    """Without drop_dropout the adapters read different values; without sink_scale their scales do not join."""
    values = tensors(dtype=dtype, factors=torch.float32, ranks=(2, 3))
    gm = two_adapters(values, dtype)
    assert ops(gm) == {"dropout": 2, "to": 4, "lora_linear": 2}
    result = canonicalise(gm, Context())
    assert ops(gm) == {"lora_linear": 1, "cat": 3, "expand": 2}
    assert (len(result.applied), result.refused) == (7, [])
    check_adapters(gm, values)


@pytest.mark.parametrize("budget", range(8))
def test_every_rewrite_counts_towards_the_limit(budget):
    values = tensors(dtype=torch.bfloat16, factors=torch.float32, ranks=(2, 3))
    gm = two_adapters(values, torch.bfloat16)
    result = canonicalise(gm, Context(budget=budget))
    assert len(result.applied) == budget
    check_adapters(gm, values)


def test_the_canonical_form_is_its_own():
    gm = two_adapters(tensors(dtype=torch.bfloat16, factors=torch.float32, ranks=(2, 3)), torch.bfloat16)
    canonicalise(gm, Context())
    text = gm.code
    result = canonicalise(gm, Context())
    assert (result.applied, result.refused, gm.code) == ([], [], text)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def block(self, x):
        return torch.tanh(self.down(torch.tanh(self.up(x))))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, self.block(x), use_reentrant=False)


def test_nested_bodies_are_brought_into_the_form():
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear", dropout=0.3)
    model = adaptc.compile(copy.deepcopy(Checkpointed()), plan, backend="eager").eval()
    gm, inputs, sites = capture(model, torch.randn(4, 6))
    insert(gm, Context(sites=sites))
    expected = gm(*inputs)
    result = canonicalise(gm, Context())
    bodies = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [n for m in bodies for n in lora_nodes(m)]
    assert len(bodies) == 2 and len(nodes) == 4
    assert {n.args[5] for n in nodes} == {"r"}
    assert "dropout" not in ops(gm)
    assert sorted(r.site for r in result.applied) == ["down"] * 4 + ["up"] * 4
    torch.testing.assert_close(gm(*inputs), expected)
