"""A checkpointed block keeps its input, and the seeds of its dropouts, whatever the passes made of it."""

from __future__ import annotations

import copy

import pytest
import torch

import adaptc
from adaptc.codegen.choices import Choice
from adaptc.codegen.torch_internals import is_backward
from adaptc.passes import reassociate
from tests.models import hosts

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
SITES = 7


def checkpointed(backend="aot_eager", dtype=torch.float32, regional=False, **options):
    method = adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": "all-linear", **options})
    torch.manual_seed(0)
    model = hosts.build("llama", train=True, num_hidden_layers=1).to(dtype)
    model = adaptc.compile(copy.deepcopy(model), method, backend=backend, regional=regional)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**hosts.batch("llama")).loss.backward()
    return [graph for graph in model.adaptc.graphs if graph.sites]


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("options", [
    {}, {"dropout": 0.1}, {"dropout": 0.1, "dtype": torch.bfloat16}, {"dora": True}, {"dropout": 0.1, "dora": True},
    {"dropout": 0.1, "regional": True},
], ids=["lora", "dropout", "bf16", "dora", "dora, dropout", "regional"])  # fmt: skip
def test_nothing_more_is_kept_than_torch_would(options, backend):
    """Before the passes on the joint graph every node has the marks that torch gave it."""
    for graph in checkpointed(backend, **options):
        seeds = 8 * SITES if options.get("dropout") and not options.get("dora") else 0
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
