"""What ``explain()``, the counts and the text of graphs say of a quantised base."""

from __future__ import annotations

import re

import pytest
from torch import nn

import adaptc
from tests.quantised import bases
from tests.quantised.test_training import LORA

M, N, K, R = 5, 128, 64, 2


@pytest.mark.parametrize("kind", bases.KINDS)
def test_the_report_says_what_the_base_is(kind):
    dense = bases.plain()
    model = adaptc.compile(bases.build(kind), LORA, backend="eager")
    report = model.adaptc.explain().to_dict()
    assert report["base"][0] == f"{bases.KINDS[kind]}: 14 modules"
    assert "  model.layers.{0,1}.self_attn.q_proj" in report["base"]
    frozen = sum(p.numel() for p in dense.parameters())
    assert f"beside {frozen:,} frozen" in report["trained parameters"][0]


def test_a_dense_base_has_no_section():
    assert "base" not in adaptc.compile(bases.plain(), LORA, backend="eager").adaptc.explain().to_dict()


@pytest.fixture(scope="module", params=bases.KINDS)
def graph(request):
    """The graph of two quantised layers, after a step."""
    import torch

    net = nn.Sequential(nn.Linear(K, K), nn.Linear(K, N))
    model = adaptc.compile(
        bases.quantise(net, request.param), adaptc.LoRA(r=R, init="random", targets="all-linear"), backend="aot_eager"
    )
    model.train()(torch.randn(M, K)).sum().backward()
    (found,) = model.adaptc.graphs
    return model, found


def test_products_of_the_base_are_counted_where_they_run(graph):
    """A product of each layer in the forward, in the backward one of the second: the input needs no gradient."""
    lines = graph[0].adaptc.explain().to_dict()["graph 0: cost over the frozen base (estimated)"]
    found = {line.split()[0]: re.search(r"([\d.]+) (k?)FLOP \+", line) for line in lines if "FLOP" in line}
    flops = {phase: float(m[1]) * (1e3 if m[2] else 1) for phase, m in found.items()}
    # As printed, to three digits.
    forward, backward = 0.99 * 2 * M * (K * K + N * K), 0.99 * 2 * M * N * K
    # Products alone: scales, sums of gradients and casts come on top.
    assert forward <= flops["forward"] < 1.3 * forward
    assert backward <= flops["backward"] < 1.3 * backward


def test_the_joint_graphs_text_names_sites_and_gradients(graph):
    text = graph[1].stage("joint")
    results = text.splitlines()[-1]
    for site in "01":
        assert f"A:{site}" in text and f"B:{site}" in text
        assert f"grad A:{site} = " in results and f"grad B:{site} = " in results
    assert "_modules" not in text and "primals" not in text
    forward, _, backward = text.partition("(backward)")
    assert "lora_linear" in forward and "dequantize" not in forward and "lora_factor_grad" in backward
