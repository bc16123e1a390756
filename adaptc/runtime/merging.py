"""Weights with the live adapters folded in: each site's adapters say what replaces which of its module's tensors
(``Adapter.merged``); here they are asked whether they can, for all sites, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from adaptc import distributed
from adaptc.errors import UnsupportedError
from adaptc.methods.base import Adapter
from adaptc.methods.quantised import Refusal
from adaptc.runtime.site_adapters import adapters_of

if TYPE_CHECKING:
    from adaptc.runtime.adapters import AdapterSet, Site


def folded_state(adapters: AdapterSet, within: str = "") -> dict[str, torch.Tensor]:
    """The base model's ``state_dict`` with the live adapters in its weights; new tensors only at their sites.

    ``within``: of the module of this path alone, under its names in the whole model.

    Raises:
        UnsupportedError: names the site whose adapter cannot be folded, before any work is done.
    """
    below = f"{within}." if within else ""
    model = adapters.model
    sites = [site for site in adapters.sites if _live(site.module) and f"{site.path}.".startswith(below)]
    if distributed.is_sharded(model):
        raise UnsupportedError(
            "a sharded model's weights cannot be merged",
            do="model.adaptc.save(directory) in all processes, then load it into a whole model and merge there",
        )
    for site in sites:
        _check(site, model)
    ours = tuple(f"{path}.adapters.".lstrip(".") for site in adapters.sites for path in site.paths)
    named = model.state_dict().items()
    state = {name: tensor for name, tensor in named if name.startswith(below) and not name.startswith(ours)}
    for site in sites:
        first, beside = _together(_live(site.module))
        for local, value in first.merged(site.module, beside).items():
            state.update({name: value for path in site.paths if (name := f"{path}.{local}") in state})
    return state


def fold_in(adapters: AdapterSet) -> None:
    """Write the folded weights into the model's own; all are computed before the first is written.

    Raises:
        UnsupportedError: as :func:`folded_state`; nothing has changed then.
    """
    state = folded_state(adapters)
    named = adapters.model.state_dict()
    for name, value in state.items():
        if value.data_ptr() != named[name].data_ptr():
            named[name].copy_(value)


def _live(module: nn.Module | None) -> list[Adapter]:
    found = None if module is None else adapters_of(module)
    if found is None:
        return []
    return [*found.live, *([] if found.standin is None else [found.standin])]


def _together(adapters: Sequence[Adapter]) -> tuple[Adapter, list[Adapter]]:
    """The adapter that speaks for all of a site, and the others: one that cannot be merged beside every other."""
    first = max(adapters, key=lambda a: (a.merges_alone is not None, a.acts_inside or a.replaces_forward))
    return first, [a for a in adapters if a is not first]


def _check(site: Site, model: nn.Module) -> None:
    adapters = _live(site.module)
    refusal = _refusal(adapters, site.module)
    if refusal is None and (other := _tied(site, model)):
        there = _live(model.get_submodule(other.rpartition(".")[0]))
        if [a.merge_key() for a in adapters] != [a.merge_key() for a in there]:
            refusal = Refusal(f"its weight is also {other}, which has no adapter, or another one")
    if refusal is None:
        return
    headline, found = f"{site.path}: the adapter cannot be merged", refusal.reason
    if refusal.found is not None:
        headline = f"{site.path}: the adapter ({adapters[0].method.kind}) cannot be merged: {refusal.reason}"
        found = refusal.found
    raise UnsupportedError(headline, found=found, do=refusal.do or "save the adapter by itself (merge=False)")


def _refusal(adapters: Sequence[Adapter], module: nn.Module) -> Refusal | None:
    """Why the module's tensors cannot take up what its live adapters do."""
    for adapter in adapters:
        if not adapter.method.mergeable and (refusal := adapter.merge_refusal(module)):
            return refusal
    first, beside = _together(adapters)
    if first.merges_alone is not None and any(a.merges_alone != first.merges_alone for a in beside):
        return Refusal(first.merges_alone)
    return first.merge_refusal(module, beside)


def _tied(site: Site, model: nn.Module) -> str | None:
    """Another name of one of the site's own tensors, or None."""
    inner = any(a.replaces_forward or a.acts_inside for a in _live(site.module))
    own = {id(p) for p in site.module.parameters(recurse=inner)}
    inside = tuple(f"{path}." for path in site.paths)
    named = model.named_parameters(remove_duplicate=False)
    return next((name for name, p in named if id(p) in own and not name.startswith(inside)), None)
