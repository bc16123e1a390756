"""Training through Inductor: the numbers are the formula's, and Inductor really generated the code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics

import adaptc
from tests.models import hosts
from tests.reference import check_all_rewritten, check_steps_agree, reference_step, relative_errors, step

pytestmark = pytest.mark.inductor

#: Host -> changes of its config, adapted modules, graphs of the base. transformers' GPT-2 logs while it computes
#: the loss, which breaks the graph.
CASES = {
    "llama": ({"num_hidden_layers": 1}, 7, 1),
    "gpt2": ({"n_layer": 1}, 4, 2),
    "bert": ({"num_hidden_layers": 1}, 7, 1),
}


def lora(**options):
    return adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear", **options)


@pytest.fixture(autouse=True)
def generated():
    """What Inductor did in this test: kernels generated, library calls in its code, graphs compiled."""
    counters.clear()
    metrics.reset()
    names = ("extern_calls", "fxgraph_cache_miss")
    return lambda: (metrics.generated_kernel_count, *(counters["inductor"][name] for name in names))


@pytest.mark.parametrize("host", hosts.slowly(CASES, also=["bert", "gpt2"]))
def test_a_training_step_computes_the_formula(host, generated):
    changes, sites, graphs = CASES[host]
    base = hosts.build(host, train=True, **changes)
    model = adaptc.compile(copy.deepcopy(base), lora(), backend="inductor")
    batch = hosts.batch(host)
    want = reference_step(model, base, batch)
    assert len(want[1]) == 2 * sites
    check_steps_agree(step(model, batch), want)
    check_all_rewritten(model, sites)
    assert len(model.adaptc.graphs) == graphs
    kernels, calls, compilations = generated()
    assert kernels > 0 and calls > 0
    assert compilations == 2 * graphs, "a forward and a backward each"
    in_place = [graph.in_place for graph in model.adaptc.graphs if graph.sites]
    assert sum(in_place) >= (0 if host == "bert" else sites), "the corrected output of every site"
    assert f"in place  {in_place[0]} results" in str(model.adaptc.explain())


@pytest.mark.slow
def test_dropout_draws_new_masks_each_step_and_repeats_with_the_seed(generated):
    base = hosts.build("llama", train=True, num_hidden_layers=1)
    model = adaptc.compile(copy.deepcopy(base), lora(dropout=0.3), backend="inductor")
    batch = hosts.batch("llama")
    torch.manual_seed(1)
    first, second = step(model, batch), step(model, batch)
    torch.manual_seed(1)
    again = step(model, batch)
    assert first[0] == again[0] and all(torch.equal(g, again[1][name]) for name, g in first[1].items())
    assert first[0] != second[0] and not any(torch.equal(g, second[1][name]) for name, g in first[1].items())
    _, plain = reference_step(model, base, batch)
    for name, error in relative_errors(first[1], plain).items():
        assert error > 1e-3, f"{name}: dropout does nothing"

    optimizer = torch.optim.AdamW(model.adaptc.parameters(), lr=5e-2)
    losses = []
    for _ in range(20):
        losses.append(step(model, batch)[0])
        optimizer.step()
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    check_all_rewritten(model, 7)
    assert generated()[2] == 2
    assert len(model.adaptc.graphs) == 1, "twenty steps and three seeds are one graph"
