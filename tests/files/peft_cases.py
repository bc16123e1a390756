"""Adapters on real models without a compiler: attach what a plan says, and compare with PEFT's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from adaptc import Plan
from adaptc.files import checkpoint, peft_keys
from adaptc.files.fingerprint import fingerprint
from adaptc.methods.base import Adapter
from adaptc.plan.peft.reading import config_to_rules
from adaptc.plan.peft.writing import rules_to_config
from adaptc.runtime.fresh import with_all_biases
from tests.models import hosts


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Give every trained parameter values that are neither zero nor what the base has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))


def plan_of(config: Mapping[str, Any], **options: Any) -> Plan:
    """The plan that a PEFT config means."""
    return Plan(config_to_rules(config, **options))


def peft_config(config: dict[str, Any]) -> peft.PeftConfig:
    """PEFT's config object; LoRA's without ``peft_type``."""
    kind = config.get("peft_type", "LORA")
    options = {key: value for key, value in config.items() if key != "peft_type"}
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)


def peft_model(host: str, config: dict[str, Any], *, double: bool = True, **changes: Any) -> peft.PeftModel:
    """PEFT's model of the config on the host, with random adapter values, in eval mode."""
    base = hosts.build(host, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base.double() if double else base, peft_config(config))
    randomise(model)
    return model.eval()


def peft_save(model: peft.PeftModel, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


def peft_load(host: str, directory: Path, *, double: bool = True, **changes: Any) -> peft.PeftModel:
    base = hosts.build(host, **changes)
    return peft.PeftModel.from_pretrained(base.double() if double else base, directory).eval()


def correct(adapter: Adapter) -> Any:
    """A forward hook that applies the adapter's reference expression."""
    return lambda module, args, output: adapter.apply_to(module, args[0], output)


def correct_input(adapter: Adapter) -> Any:
    """A forward pre-hook of an adapter that acts on the module's input."""
    return lambda module, args: (adapter.apply_before(module, args[0]), *args[1:])


class Adapted:
    """A host with the adapters of a plan, computed by the methods' reference expressions."""

    def __init__(self, host: str, plan: Plan, *, double: bool = True, **changes: Any) -> None:
        self.base = hosts.build(host, **changes)
        self.base.requires_grad_(False)
        if double:
            self.base.double()
        self.plan = plan
        self.sites = with_all_biases(plan.resolve(self.base), self.base)
        self.adapters: dict[str, Adapter] = {}
        for number, site in enumerate(self.sites):
            adapter = site.method.build(site.path, site.module, dtype=None, site_id=number)
            self.adapters[site.path] = adapter.eval()
        for kind in dict.fromkeys(type(adapter.method) for adapter in self.adapters.values()):
            kind.link([a for a in self.adapters.values() if type(a.method) is kind])
        for site in self.sites:
            adapter = self.adapters[site.path]
            if adapter.replaces_forward:
                site.module.forward = adapter.replace
            elif adapter.acts_before:
                site.module.register_forward_pre_hook(correct_input(adapter))
            else:
                site.module.register_forward_hook(correct(adapter))
        self.base.eval()

    def __call__(self, **inputs: Any) -> Any:
        return self.base(**inputs)

    def load(self, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> None:
        decoded = peft_keys.decode(tensors, self.adapters, model=self.base, config=config)
        peft_keys.assign(decoded, self.adapters)

    def config(self, **options: Any) -> dict[str, Any]:
        return rules_to_config(self.plan.rules, self.sites, model=self.base, **options)

    def save(self, directory: Path, **options: Any) -> Path:
        config = self.config(**options)
        return checkpoint.write_adapter(
            directory,
            config=config,
            tensors=peft_keys.encode(self.adapters, config),
            plan=self.plan.to_dict(),
            fingerprint=fingerprint(self.base, self.adapters),
        )


def load(host: str, directory: Path, *, double: bool = True, **changes: Any) -> Adapted:
    """Read an adapter folder onto a fresh host."""
    files = checkpoint.read_adapter(directory)
    bare = hosts.build(host, **changes)
    plan = plan_of(files.config, model=bare, loading=True)
    adapted = Adapted(host, plan, double=double, **changes)
    adapted.load(files.tensors, files.config)
    return adapted


def logits(model: Any, host: str) -> torch.Tensor:
    inputs = {k: v for k, v in hosts.batch(host).items() if k not in ("labels", "return_loss")}
    if host == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.logits_per_text
