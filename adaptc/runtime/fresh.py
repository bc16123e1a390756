"""New adapters for the sites of a plan."""

from __future__ import annotations

import torch
from torch import nn

from adaptc.errors import SiteError
from adaptc.methods.base import Adapter
from adaptc.methods.bias import Bias
from adaptc.plan import Assignment, Resolution
from adaptc.runtime import attach


def fresh(assignment: Assignment, dtype: torch.dtype | None, site_id: int = 0) -> Adapter:
    """A new adapter for a site. A copy of a module that it has is without the adapters inside the module."""
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False):
        adapter = assignment.build(dtype=dtype, site_id=site_id)
    if adapter.replaces_forward:
        attach.strip(adapter)
    return adapter


def have_one_weight(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have equal weights; those without one have."""
    a, b = getattr(one, "weight", None), getattr(other, "weight", None)
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b
    return a.shape == b.shape and torch.equal(a.detach(), b.detach().to(a))


def with_all_biases(resolution: Resolution, model: nn.Module) -> list[Assignment]:
    """The resolution's sites, and for LoRA with ``bias="all"`` every other module that has a bias.

    Raises:
        SiteError: a bias whose module has no adapter for it.
    """
    rules = [a.rule for a in resolution.sites if getattr(a.method, "bias", "none") == "all"]
    if not rules:
        return resolution.sites
    taken = {a.path for a in resolution.sites}
    replaced = [a.path for a in resolution.sites if a.train == "full"]
    method, extra = Bias(), []
    for path, module in model.named_modules():
        if getattr(module, "bias", None) is None or path in taken or isinstance(module, Adapter):
            continue
        if ".adapters." in f".{path}." or any(path.startswith(f"{full}.") for full in replaced):
            continue
        if reason := method.why_not(path, module):
            raise SiteError(f"{path}: its bias cannot be trained (bias='all')", found=reason)
        extra.append(Assignment(path, (path,), module, rules[0], method))
    return [*resolution.sites, *extra]
