"""The report says what was done, what it costs and what was not done."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc.ir.fold import fold, ranges, unfold
from adaptc.report.explain import number_text
from tests.models import hosts


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.spare = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(**options):
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets=["up", "down"])
    return adaptc.compile(Net(), plan, backend="aot_eager", **options)


def test_sites_rules_and_parameters():
    text = str(adapted().adaptc.explain())
    assert text.startswith("Net: 2 adapted modules\n  adapter 'default' (live)\n    rule 1: LoRA(targets=")
    # r (K + N) for each site, beside the frozen weights and biases
    trained, frozen = 3 * (6 + 10) + 3 * (10 + 4), 6 * 10 + 10 + 10 * 4 + 4 + 4 * 4 + 4
    assert f"{trained} beside {frozen} frozen ({trained / frozen:.3%}), float32" in text


def test_before_a_call_there_are_no_graphs_and_it_says_how_to_get_them():
    assert "none yet: the model has not been called (example_inputs= gives a report before)" in str(
        adapted().adaptc.explain()
    )


def test_example_inputs_give_the_report_of_the_first_call_and_leave_no_trace():
    x = torch.randn(5, 6)
    model = adapted(example_inputs=(x,))
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    before = model.adaptc.explain().to_dict()
    assert "graphs of example inputs (no call yet)" in before
    assert model.adaptc.metrics()["graphs"] == 0 and model.adaptc.metrics()["calls"] == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(x).sum().backward()
    after = model.adaptc.explain().to_dict()
    for title in ("graph 0: passes", "graph 0: cost over the frozen base (estimated)"):
        assert after[title] == before[title]


def test_costs_over_the_frozen_base():
    model = adapted()
    model(torch.randn(5, 6)).sum().backward()
    lines = model.adaptc.explain().to_dict()["graph 0: cost over the frozen base (estimated)"]
    m, r = 5, 3
    # linear: products and bias; tanh one operation an element
    base = 2 * m * (6 * 10 + 10 * 4) + m * (10 + 4) + m * 10
    # x A^T and h B^T, the scale on the bottleneck, the sum
    extra = sum(2 * m * r * (k + n) + m * r + m * n for k, n in ((6, 10), (10, 4)))
    assert lines[0].startswith(f"forward   {number_text(base, 'FLOP')} + {number_text(extra, 'FLOP')} (+")
    saved = next(line for line in lines if line.startswith("saved"))
    # tanh's result for the base; for the adapters the two bottlenecks
    assert f"{m * 10 * 4} B + {2 * m * r * 4} B" in saved


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
def test_bytes_kept_before_and_after(backend):
    """With dropout torch keeps for each site the bottleneck and what the mask left of the input; the passes keep the
    bottleneck and a seed."""
    plan = adaptc.LoRA(r=3, alpha=6, init="random", dropout=0.5, targets=["up", "down"])
    model = adaptc.compile(Net(), plan, backend=backend)
    model(torch.randn(5, 6)).sum().backward()
    lines = model.adaptc.explain().to_dict()["graph 0: cost over the frozen base (estimated)"]
    m, r = 5, 3
    tanh, bottlenecks, dropped = 4 * m * 10, 4 * m * 2 * r, 4 * m * (6 + 10)
    (graph,) = model.adaptc.graphs
    (base, now), (base_before, before) = map(graph.saved_bytes, (graph.stages[-1], "joint"))
    assert base == base_before == tanh
    assert now - bottlenecks in (16, 24)  # the seeds; the partitioner may keep one of them twice
    assert before == bottlenecks + dropped + 8  # of the first dropout the input's gradient needs the mask
    (saved,) = [line for line in lines if line.startswith("saved ")]
    assert saved.startswith(f"saved     {tanh} B + {now} B (") and saved.endswith(" before these passes")
    assert f"; {tanh} B + {before} B (" in saved
    (share,) = [line for line in model.adaptc.explain().to_dict()["graph 0: passes"] if line.startswith("share ")]
    # Before, one seed is read in the backward; then both are.
    assert f"saved {tanh + bottlenecks + dropped + 8} B -> {tanh + bottlenecks + 16} B" in share


def test_passes_show_counts_and_refusals():
    plan = adaptc.Plan([adaptc.LoRA(r=3, targets=["up", "down"])], passes={"limit": {"insert": 1}})
    model = adaptc.compile(Net(), plan, backend="aot_eager")
    model(torch.randn(5, 6))
    lines = model.adaptc.explain().to_dict()["graph 0: passes"]
    assert lines[0].startswith("insert        applied 1 of 2    lora_site 2 -> 1, ")
    assert "  refused down: limit reached" in lines


def test_layers_are_folded():
    model = adaptc.compile(
        hosts.build("llama", num_hidden_layers=4), adaptc.LoRA(targets="all-linear"), backend="aot_eager"
    )
    text = str(model.adaptc.explain())
    assert "    model.layers.{0..3}.self_attn.q_proj\n" in text
    assert "layers.2" not in text
    assert "left out: lm_head: output head" in text


def test_graphs_of_equal_layers_are_told_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            y = self.fc(x)
            torch._dynamo.graph_break()
            return torch.tanh(y)

    model = nn.Sequential(*(Block() for _ in range(4)))
    model = adaptc.compile(model, adaptc.LoRA(r=3, init="random", targets="all-linear"), backend="aot_eager")
    model(torch.randn(5, 6, requires_grad=True)).sum().backward()
    report = model.adaptc.explain().to_dict()
    told = [title for title in report if title.endswith(": passes")]
    assert len(told) < len([g for g in model.adaptc.graphs if g.sites]) or len(told) == 1
    assert any("ends at a graph break: " in line for line in report["graphs"])


def test_what_did_not_run_is_named():
    plan = adaptc.LoRA(r=3, targets="all-linear")
    model = adaptc.compile(Net(), plan, backend="aot_eager")
    model(torch.randn(5, 6))
    assert model.adaptc.explain().to_dict()["attention"] == ["did not run in any forward: spare"]


def test_a_module_trained_in_full_is_not_called_idle():
    plan = [{"match": {"targets": ["down"]}, "train": "full"}, adaptc.LoRA(r=3, targets=["up"])]
    model = adaptc.compile(Net(), plan, backend="aot_eager")
    model(torch.randn(5, 6))
    assert model.adaptc.idle_sites() == []


def test_a_backend_without_a_joint_graph_says_so():
    plan = adaptc.LoRA(r=3, targets=["up"])
    model = adaptc.compile(Net(), plan, backend="eager")
    assert "  passes on the joint graph do not run: this backend does not show it" in str(model.adaptc.explain())


@pytest.mark.parametrize(
    "value, text", [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1250, "1.25 kB"), (999_600, "1 MB"), (3e15, "3 PB")]
)
def test_numbers(value, text):
    assert number_text(value, "B") == text


def test_folding_is_exact():
    paths = [f"h.{i}.mlp.{j}.fc" for i in (0, 1, 2, 5) for j in range(3)] + ["head", "h.x", "h.007"]
    folded = fold(paths)
    assert folded == ["h.{0..2,5}.mlp.{0..2}.fc", "head", "h.x", "h.007"]
    assert sorted(p for f in folded for p in unfold(f)) == sorted(paths)
    assert ranges([8, 0, 1, 2, 3]) == "0..3,8"
