"""What training did at each site: how far the update moved the frozen weight, and at what cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class SiteChange:
    """``ratio`` is the Frobenius norm of the learned update over that of the frozen weight."""

    path: str
    kind: str
    parameters: int
    ratio: float


def site_changes(sites: Any, name: str = "default") -> list[SiteChange]:
    """One record per site of the handle's ``sites``, in their order."""
    changes = []
    for site in sites:
        adapter = site.module.adapters[name]
        count = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        ratio = _update(site.module, adapter) / torch.linalg.norm(site.module.weight.detach().double())
        changes.append(SiteChange(site.path, adapter.method.kind, count, float(ratio)))
    return changes


@torch.no_grad()
def _update(module: nn.Module, adapter: Any) -> torch.Tensor:
    """Norm of the update of the site's weight, in fp64."""
    update = adapter.copy.weight.double() - module.weight.double() if adapter.replaces_forward else adapter.delta()
    norm: torch.Tensor = torch.linalg.norm(update)
    return norm
