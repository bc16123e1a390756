"""Adapters on real models without a compiler: attach what a plan says, and compare with PEFT's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from adaptc import Plan
from adaptc.methods.base import Adapter
from adaptc.runtime import checkpoint, peft_format
from adaptc.runtime.adapters import with_all_biases
from tests.models import hosts


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Give every trained parameter values that are neither zero nor what the base has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))


def peft_model(host: str, config: dict[str, Any], *, double: bool = True, **changes: Any) -> peft.PeftModel:
    """PEFT's model of the config on the host, with random adapter values, in eval mode."""
    base = hosts.build(host, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base.double() if double else base, peft.LoraConfig(**config))
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
            if adapter.replaces_forward:
                site.module.forward = adapter.replace
            else:
                site.module.register_forward_hook(correct(adapter))
        self.base.eval()

    def __call__(self, **inputs: Any) -> Any:
        return self.base(**inputs)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        decoded = peft_format.decode(tensors, self.adapters, model=self.base)
        for path, values in decoded.items():
            for suffix, tensor in peft_format.tensors_of(self.adapters[path]).items():
                tensor.data.copy_(values[suffix])

    def config(self, **options: Any) -> dict[str, Any]:
        return peft_format.plan_to_config(self.plan, self.sites, model=self.base, **options)

    def save(self, directory: Path, **options: Any) -> Path:
        return checkpoint.write_adapter(
            directory,
            config=self.config(**options),
            tensors=peft_format.encode(self.adapters),
            plan=self.plan.to_dict(),
            fingerprint=checkpoint.fingerprint(self.base, self.adapters),
        )


def load(host: str, directory: Path, *, double: bool = True, **changes: Any) -> Adapted:
    """Read an adapter folder onto a fresh host."""
    files = checkpoint.read_adapter(directory)
    bare = hosts.build(host, **changes)
    plan = peft_format.config_to_plan(files.config, model=bare, loading=True)
    adapted = Adapted(host, plan, double=double, **changes)
    adapted.load(files.tensors)
    return adapted


def logits(model: Any, host: str) -> torch.Tensor:
    inputs = {k: v for k, v in hosts.batch(host).items() if k not in ("labels", "return_loss")}
    if host == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.logits_per_text
