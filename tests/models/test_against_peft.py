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
from tests.reference import check_all_rewritten, check_steps_agree, reference_step, relative_errors, step

SHAPES = ({"rows": 2, "length": 10}, {"rows": 3, "length": 7})


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


def peft_step(twin: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """:func:`step` of PEFT's model, the gradients by adaptc's names."""
    loss, gradients = step(twin, batch)
    ours = re.compile(r"^base_model\.model\.(.*)\.(lora_[AB])\.default\.weight$")
    return loss, {ours.sub(r"\1.adapters.default.\2", name): g for name, g in gradients.items()}


def check_same(model: nn.Module, twin: nn.Module, batch: Mapping[str, Any]) -> None:
    want = peft_step(twin, batch)
    assert len(want[1]) == 2 * len(model.adaptc.sites), "every factor has a gradient"
    check_steps_agree(step(model, batch), want)


class CountingBackend:
    """A Dynamo backend that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return gm


# test_against_formula has GPT-2 and BERT among the default tests.
@pytest.mark.parametrize("host", hosts.slowly(hosts.HOSTS, also=("gpt2", "bert")))
def test_every_class_computes_what_peft_computes(host):
    cases = [(train, hosts.batch(host, **shape)) for train, shape in itertools.product((True, False), SHAPES)]
    counting = CountingBackend()
    plain = hosts.short(host).requires_grad_(False)
    captured = torch.compile(plain, backend=counting)
    for train, batch in cases:
        plain.train(train)
        captured(**batch)
    torch.compiler.reset()  # Dynamo remembers, per frame, which sizes changed

    model = adaptc.compile(hosts.short(host), lora(), backend="aot_eager")
    twin = peft_twin(hosts.short(host), model)
    for train, batch in cases:
        check_same(model.train(train), twin.train(train), batch)
    check_all_rewritten(model, *hosts.ALL_LINEAR[host])
    assert len(model.adaptc.graphs) == counting.graphs, "no more graphs than the base model has"


PATTERNS = {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"1.self_attn.k_proj": 1.5}}


@pytest.mark.parametrize(
    "ours, theirs", [({"rslora": True}, {"use_rslora": True}), (PATTERNS, PATTERNS)], ids=["rslora", "patterns"]
)
def test_options_mean_what_they_mean_in_peft(ours, theirs):
    model = adaptc.compile(hosts.build("llama", train=True), lora(**ours), backend="aot_eager")
    twin = peft_twin(hosts.build("llama"), model, **theirs).train()
    check_same(model, twin, hosts.batch("llama"))
    check_all_rewritten(model, 14)


def test_patterns_reach_the_sites_they_name():
    model = adaptc.compile(hosts.build("llama"), lora(**PATTERNS), backend="aot_eager")
    ranks = [site.adapters["default"].lora_A.shape[0] for site in model.adaptc.sites]
    scales = [site.adapters["default"].scaling for site in model.adaptc.sites]
    assert ranks == [5, 3, 3, 3, 3, 3, 3, 5, 3, 3, 3, 2, 2, 2]
    assert scales == [6 / 5, 2, 2, 2, 2, 2, 2, 6 / 5, 0.5, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    "kind, options, size",
    [
        ("bf16-base", {}, 0.05),
        ("bf16-base", {"compute_dtype": "float32"}, 1.0),
        ("autocast", {}, 1.0),
    ],
    ids=["bf16-base", "bf16-base-fp32-compute", "autocast"],
)
def test_sixteen_bit_arithmetic_is_as_exact_as_pefts(kind, options, size):
    """``size`` scales B. On a 16-bit base PEFT computes the correction in fp32, adaptc in the base's dtype: as exact
    where the correction is smaller than the base's own output (0.05: a fifth of W), and with ``compute_dtype``
    whatever its size."""
    base = hosts.short("llama", train=True)
    if kind == "bf16-base":
        base = base.to(torch.bfloat16)
    model = adaptc.compile(copy.deepcopy(base), lora(**options), backend="aot_eager")
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        for site in model.adaptc.sites:
            site.adapters["default"].reset_parameters(site.module.weight)
            site.adapters["default"].lora_B.data.mul_(size)
        twin = peft_twin(copy.deepcopy(base), model).train()
        batch = hosts.batch("llama", rows=4, length=12, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            (loss, got), (peft_loss, peft_got) = step(model, batch), peft_step(twin, batch)
        want_loss, want = reference_step(model, base, batch)
        ours += [float(loss / want_loss - 1), *relative_errors(got, want).values()]
        theirs += [float(peft_loss / want_loss - 1), *relative_errors(peft_got, want).values()]
    check_all_rewritten(model, *hosts.ALL_LINEAR["llama"])
    assert len(model.adaptc.graphs) == 1
    error, yardstick = (float(torch.tensor(e, dtype=torch.float64).norm()) for e in (ours, theirs))
    assert 0 < error <= 1.1 * yardstick
