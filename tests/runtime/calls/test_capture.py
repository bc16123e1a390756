"""Every model is captured whatever its class, and what is not captured is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import RecompileLimitWarning
from tests.models import hosts
from tests.reference import check_against_reference

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_twelve_models_of_one_class_are_all_captured(backend):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    for _ in range(12):
        base = Block()
        model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend)
        check_against_reference(model, base, torch.randn(5, 6))
        metrics = model.adaptc.metrics()
        assert (metrics["graphs"], metrics["eager_sites"], metrics["recompile_limits_hit"]) == (1, 0, 0)
        assert model.adaptc.graphs[0].sites == ["a", "b"]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "build, shape, sites",
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (4, 6), 2),
        (encoder, (2, 5, 8), 4),
        (lambda: nn.Linear(6, 3), (4, 6), None),
    ],
    ids=["sequential", "transformer-encoder", "linear-root"],
)
def test_torch_containers_as_root(build, shape, sites, backend):
    base = build()
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear", exclude=["**.out_proj", "out_proj"])
    if isinstance(base, nn.TransformerEncoder):
        plan = adaptc.LoRA(r=3, alpha=6, init="random", targets=["linear1", "linear2"])
    elif sites is not None:
        plan = LORA
    if sites is None:
        with pytest.raises(adaptc.errors.PlanError):
            adaptc.compile(base, LORA, backend=backend)
        return
    model = adaptc.compile(copy.deepcopy(base), plan, backend=backend)
    for mode in (True, False):
        model.train(mode)
        check_against_reference(model, base.train(mode), torch.randn(shape))
    with torch.no_grad():
        check_against_reference(model, base, torch.randn(shape))
    assert model.adaptc.metrics()["eager_sites"] == 0
    for graph in model.adaptc.graphs:
        assert len(graph.sites) == sites
        linears = [n for n in graph.graph_module("captured").graph.nodes if "linear" in str(n.target)]
        assert len(linears) >= sites, "the base op and its anchor are in one graph"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    base = hosts.short("llama", train=True)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend)
    with torch.autocast("cpu", dtype):
        check_against_reference(model, base, hosts.batch("llama"), rtol=0.08, atol=1e-2)
    assert model.adaptc.metrics()["eager_sites"] == 0


def test_a_recompile_limit_is_counted_and_warned_about(monkeypatch):
    monkeypatch.setattr("adaptc.runtime.calls.captures.RECOMPILE_LIMIT", 2)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.flavour = "0"

        def forward(self, x):
            return self.fc(x) * len(self.flavour)

    base = Counting()
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="eager")
    x = torch.randn(2, 4)
    with pytest.warns(RecompileLimitWarning, match="recompile_limit"):
        for n in range(1, 6):
            base.flavour = model.flavour = "x" * n
            check_against_reference(model, base, x)
    assert model.adaptc.metrics()["recompile_limits_hit"] >= 1
    assert model.adaptc.eager_sites() == ["fc"]


class BreakingBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 3), nn.Linear(width + 3, width)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        torch._dynamo.graph_break()
        return x + self.down(h)


class Stack(nn.Module):
    def __init__(self, layers=10, width=5, block=BreakingBlock):
        super().__init__()
        self.layers = nn.ModuleList(block(width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_break_in_every_layer(backend):
    base = Stack().train()
    model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend)
    x = torch.randn(3, 5)
    for _ in range(2):
        check_against_reference(model, base, x)
    assert model.adaptc.metrics()["eager_sites"] == 0
    assert model.adaptc.idle_sites() == []
    assert any(g.break_reason and "graph_break" in g.break_reason for g in model.adaptc.graphs)


class PlainBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 3), nn.Linear(width + 3, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def test_blocks_under_the_users_own_compile():
    base = Stack(block=PlainBlock).train()
    model = copy.deepcopy(base)
    for block in model.layers:
        block.compile(backend="aot_eager")
    model = adaptc.compile(model, LORA, backend="aot_eager")
    for rows in (3, 4):
        check_against_reference(model, base, torch.randn(rows, 5))


def test_a_model_inside_the_users_compile():
    base = Stack(3, block=PlainBlock).train()
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    outer = torch.compile(lambda x: model(x) * 2, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5)
    torch.testing.assert_close(outer(x), 2 * model(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpointed_blocks_are_rewritten_in_one_graph(backend):
    class Checkpointed(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    base = Checkpointed(4, block=PlainBlock).train()
    model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend)
    check_against_reference(model, base, torch.randn(3, 5))
    (graph,) = model.adaptc.graphs
    assert len(graph.reports[0].result.applied) == 8
    assert {r.site for r in graph.reports[0].result.applied} == set(graph.sites)
    assert model.adaptc.idle_sites() == []
