"""The compiled model computes what PEFT computes, on real classes: loss and the gradient of every factor."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adaptc
from tests.models import hosts
from tests.reference import (
    as_double,
    check_all_rewritten,
    factors_of,
    loss_of,
    reference_model,
    relative_errors,
    step,
)

#: Host -> adapted modules, and how often they are called in one forward.
EXPECTED = {
    "llama": (14, 14),
    "gpt2": (8, 8),
    "bert": (13, 13),
    "roberta": (12, 12),
    "t5": (36, 36),
    "mixtral": (8, 8),  # the attention; the experts are fused weights, not linear layers
    "albert": (8, 14),  # one layer of six linear modules runs twice
    "clip": (26, 26),
}
SHAPES = ({"rows": 2, "length": 10}, {"rows": 3, "length": 7})
#: Two orders of summation in fp32.
LOSS, GRADIENT = 1e-6, 5e-6


def lora(**options: Any) -> adaptc.LoRA:
    return adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": "all-linear", **options})


def peft_twin(base: nn.Module, model: nn.Module, **options: Any) -> nn.Module:
    """``base`` wrapped by PEFT, with the adapter values of the compiled ``model``."""
    sites = {site.path: site.adapters["default"] for site in model.adaptc.sites}
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": list(sites), **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        twin = peft.get_peft_model(base, config)
    for path, adapter in sites.items():
        layer = twin.base_model.model.get_submodule(path)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
    return twin


def peft_name(name: str) -> str:
    return re.sub(r"^(.*)\.adapters\.default\.(lora_[AB])$", r"base_model.model.\1.\2.default.weight", name)


def peft_step(twin: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """:func:`step` of PEFT's model, the gradients by adaptc's names."""
    loss, gradients = step(twin, batch)
    ours = re.compile(r"^base_model\.model\.(.*)\.(lora_[AB])\.default\.weight$")
    return loss, {ours.sub(r"\1.adapters.default.\2", name): g for name, g in gradients.items()}


def check_same(model: nn.Module, twin: nn.Module, batch: Mapping[str, Any]) -> None:
    loss, gradients = step(model, batch)
    want_loss, want = peft_step(twin, batch)
    assert len(want) == 2 * len(model.adaptc.sites), "every factor has a gradient"
    assert abs(loss / want_loss - 1) < LOSS
    errors = relative_errors(gradients, want)
    assert max(errors.values()) < GRADIENT, max(errors, key=errors.get)


class CountingBackend:
    """A Dynamo backend that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return gm


@pytest.mark.parametrize("host", hosts.HOSTS)
def test_every_class_computes_what_peft_computes(host):
    cases = [(train, hosts.batch(host, **shape)) for train, shape in itertools.product((True, False), SHAPES)]
    counting = CountingBackend()
    plain = hosts.build(host).requires_grad_(False)
    captured = torch.compile(plain, backend=counting)
    for train, batch in cases:
        plain.train(train)
        captured(**batch)

    model = adaptc.compile(hosts.build(host), lora(), backend="aot_eager")
    twin = peft_twin(hosts.build(host), model)
    for train, batch in cases:
        check_same(model.train(train), twin.train(train), batch)
    check_all_rewritten(model, *EXPECTED[host])
    assert len(model.adaptc.graphs) == counting.graphs


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"rslora": True}, {"use_rslora": True}),
        (
            {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"1.self_attn.k_proj": 1.5}},
            {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"1.self_attn.k_proj": 1.5}},
        ),
    ],
    ids=["rslora", "patterns"],
)
def test_options_mean_what_they_mean_in_peft(ours, theirs):
    model = adaptc.compile(hosts.build("llama", train=True), lora(**ours), backend="aot_eager")
    twin = peft_twin(hosts.build("llama"), model, **theirs).train()
    check_same(model, twin, hosts.batch("llama"))
    check_all_rewritten(model, *EXPECTED["llama"])


def test_patterns_reach_the_sites_they_name():
    pattern = {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"1.self_attn.k_proj": 1.5}}
    model = adaptc.compile(hosts.build("llama"), lora(**pattern), backend="aot_eager")
    ranks = [site.adapters["default"].lora_A.shape[0] for site in model.adaptc.sites]
    scales = [site.adapters["default"].scaling for site in model.adaptc.sites]
    assert ranks == [5, 3, 3, 3, 3, 3, 3, 5, 3, 3, 3, 2, 2, 2]
    assert scales == [6 / 5, 2, 2, 2, 2, 2, 2, 6 / 5, 0.5, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", ["bf16-base", "autocast"])
def test_sixteen_bit_arithmetic_is_as_exact_as_pefts(kind):
    base = hosts.build("llama", train=True)
    if kind == "bf16-base":
        base = base.to(torch.bfloat16)
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        model = adaptc.compile(copy.deepcopy(base), lora(), backend="aot_eager")
        assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
        twin = peft_twin(copy.deepcopy(base), model).train()
        batch = hosts.batch("llama", rows=4, length=12, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            (loss, got), (peft_loss, peft_got) = step(model, batch), peft_step(twin, batch)
        check_all_rewritten(model, *EXPECTED["llama"])
        reference = reference_model(base, factors_of(model)).train()
        want_loss = loss_of(reference(**as_double(batch)))
        want_loss.backward()
        want = {
            f"{path}.adapters.default.lora_{factor}": getattr(reference.get_submodule(path), factor).grad
            for path in factors_of(model)
            for factor in "AB"
        }
        ours += [float(loss / want_loss - 1), *relative_errors(got, want).values()]
        theirs += [float(peft_loss / want_loss - 1), *relative_errors(peft_got, want).values()]
    error, yardstick = (float(torch.tensor(e, dtype=torch.float64).norm()) for e in (ours, theirs))
    assert 0 < error <= 1.1 * yardstick
