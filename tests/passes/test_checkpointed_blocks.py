"""A checkpointed block keeps its input, and the seeds of its dropouts, whatever the passes made of it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import adaptc
from adaptc.codegen.choices import Choice
from adaptc.passes import reassociate
from adaptc.torch_internals import is_backward
from tests.models import hosts

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
SITES = 7


def checkpointed(backend="aot_eager", dtype=torch.float32, regional=False, host="llama", layers=1, **options):
    method = adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": "all-linear", **options})
    torch.manual_seed(0)
    model = hosts.build(host, train=True, **{"num_layers" if host == "t5" else "num_hidden_layers": layers}).to(dtype)
    model = adaptc.compile(copy.deepcopy(model), method, backend=backend, regional=regional)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**hosts.batch(host)).loss.backward()
    return [graph for graph in model.adaptc.graphs if graph.sites]


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("options", [
    {}, {"dropout": 0.1}, {"dropout": 0.1, "dtype": torch.bfloat16}, {"dora": True}, {"dropout": 0.1, "dora": True},
    {"dropout": 0.1, "regional": True}, {"dropout": 0.1, "layers": 3},
    pytest.param({"host": "t5", "dropout": 0.1, "layers": 2}, marks=pytest.mark.slow),
], ids=["lora", "dropout", "bf16", "dora", "dora, dropout", "regional", "layers", "cross-attention"])  # fmt: skip
def test_nothing_more_is_kept_than_torch_would(options, backend):
    """Before the passes on the joint graph every node has the marks that torch gave it."""
    for graph in checkpointed(backend, **options):
        sites = len(graph.sites)
        seeds = 8 * sites if options.get("dropout") and not options.get("dora") else 0
        assert sum(graph.saved_bytes(graph.stages[-1])) <= sum(graph.saved_bytes("joint")) + seeds


def test_an_order_that_makes_another_weight_keeps_none(monkeypatch):
    ways = {"split": 1.0, "merge": 0.5}
    monkeypatch.setattr(reassociate, "_choose", lambda site: Choice("LoRA", ways, ways, {"split": 2, "merge": 1}))
    (graph,) = checkpointed()
    report = next(r for r in graph.reports if r.name == "reassociate")
    assert len(report.result.applied) == SITES
    assert sum(graph.saved_bytes(graph.stages[-1])) <= sum(graph.saved_bytes("joint"))


def test_every_node_of_the_forward_says_what_its_checkpoint_does_with_it():
    """AOTAutograd may save a node that does not."""
    (graph,) = checkpointed(dropout=0.1)
    for stage in graph.stages[graph.stages.index("joint") :]:
        calls = [n for n in graph.graph_module(stage).graph.nodes if n.op == "call_function" and not is_backward(n)]
        ours = [n for n in calls if "adaptc" in n.meta.get("custom", {})]
        assert len(ours) >= SITES and all("recompute" in node.meta for node in ours), stage


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Saving(nn.Module):
    """Blocks whose products a policy keeps, and nothing else."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, again=True):
        products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        make = functools.partial(create_selective_checkpoint_contexts, products)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=make) if again else block(x)
        return x


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}], ids=["", "dropout"])
def test_a_policy_that_keeps_products(options):
    torch.manual_seed(0)
    base = Saving()
    plan = adaptc.LoRA(r=2, alpha=6, init="random", targets="all-linear", **options)
    found = []
    for again in (True, False):
        torch.manual_seed(0)
        model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager").train()
        torch.manual_seed(1)
        model(torch.linspace(-1, 1, 60).view(10, 6), again).square().sum().backward()
        found.append([p.grad for p in model.adaptc.parameters()])
        if again:
            (graph,) = model.adaptc.graphs
            seeds = 8 * len(graph.sites) if options else 0
            assert sum(graph.saved_bytes(graph.stages[-1])) <= sum(graph.saved_bytes("joint")) + seeds
    torch.testing.assert_close(*found)
