"""Weights with adapters folded in: each site's adapters say what replaces which of its module's tensors
(``Adapter.merged``); here they are asked whether they can, for all sites, before anything is computed or written.

Adapters are taken in the order of their names, so that the numbers do not depend on the order in which they were given.
Where the order in which they act makes a difference, live ones are folded in that order or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from adaptc import distributed
from adaptc.errors import UnsupportedError
from adaptc.methods import affine
from adaptc.methods.base import Adapter
from adaptc.methods.quantised import Refusal
from adaptc.plan import bypassed
from adaptc.runtime.site_adapters import adapter_name, adapters_of
from adaptc.runtime.weights.patch import tensor_at
from adaptc.torch_internals import reparametrize

if TYPE_CHECKING:
    from adaptc.runtime.adapters import AdapterSet, Site


@dataclasses.dataclass(frozen=True)
class Fold:
    """The adapters that act at one site, to be folded into it.

    Attributes:
        adapters: in the order in which they act; one that replaces the module is the last.
        replaced: names of the module's tensors that get other values.
    """

    site: Site
    adapters: tuple[Adapter, ...]
    replaced: tuple[str, ...]

    @classmethod
    def of(cls, site: Site, names: Sequence[str]) -> Fold:
        adapters = _acting(site, names)
        first, beside = _together(adapters)
        return cls(site, tuple(adapters), tuple(first.replaced(site.module, beside)))

    def path(self, name: str) -> str:
        """The path of one of the replaced tensors."""
        return f"{self.site.path}.{name}".lstrip(".")

    def exact(self, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What replaces the tensors, before it is rounded: in fp64, or as a copy that was trained in full has it.

        ``base``: the base's own values of ``replaced``, in fp64 where they are floating-point numbers.
        """
        first, beside = _together(self.adapters)
        if first.replaces_forward:
            return dict(first.merged(self.site.module, beside))
        wide = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in base.items()}
        with torch.inference_mode(False), torch.no_grad(), reparametrize(self.site.module, wide):
            return dict(first.merged(self.site.module, beside))


def folds(adapters: AdapterSet, names: Sequence[str], within: str = "") -> list[Fold]:
    """What is to be folded of the adapters ``names``, in their order; nothing is computed.

    ``within``: inside the module of this path alone.

    Raises:
        UnsupportedError: names the site whose adapter cannot be folded.
    """
    below = f"{within}." if within else ""
    model = adapters.model
    sites = [site for site in adapters.sites if _acting(site, names) and f"{site.path}.".startswith(below)]
    if distributed.is_sharded(model) or any(
        distributed.wrapper_of(m) == "FullyShardedDataParallel" for m in model.modules()
    ):
        raise UnsupportedError(
            "a sharded model's weights cannot be merged",
            do="model.adaptc.save(directory) in all processes, then load it into a whole model and merge there",
        )
    for site in sites:
        _check(site, model, names)
        adapters.let_go()
    return [Fold.of(site, names) for site in sites]


def canonical(adapters: AdapterSet, names: Sequence[str]) -> tuple[str, ...]:
    """``names`` in the order in which they are folded, that of the names.

    Raises:
        UnsupportedError: they are live in another order, and act otherwise in this one.
    """
    ordered = tuple(sorted(names))
    clash = _order_matters(adapters, ordered)
    if clash is None:
        return ordered
    path, acting = clash
    raise UnsupportedError(
        f"{path}: the order in which these adapters act makes a difference, and they are folded in the order of their"
        " names",
        expected=" then ".join(map(repr, ordered)),
        found=", then ".join(f"{name!r} ({adapter.method.kind})" for name, adapter in acting),
        do=f"model.adaptc.switch({list(ordered)}) first, or give them names in the order that is meant",
    )


def as_live(adapters: AdapterSet) -> tuple[str, ...]:
    """The live adapters in the order of their names, or as they act where that makes a difference."""
    ordered = tuple(sorted(adapters.live))
    return ordered if _order_matters(adapters, ordered) is None else adapters.live


def _order_matters(
    adapters: AdapterSet, ordered: tuple[str, ...]
) -> tuple[str, list[tuple[str, Adapter]]] | None:
    """A site at which the adapters ``ordered`` are live in another order and do not only add, with what acts there."""
    now = tuple(name for name in adapters.live if name in ordered)
    if len(now) < len(ordered) or now == ordered:
        return None
    for site in adapters.sites:
        acting = [(name, adapter) for name in now for adapter in site.of(name)]
        if len({name for name, _ in acting}) > 1 and not all(adapter.adds for _, adapter in acting):
            return site.path, acting
    return None


def folded_state(adapters: AdapterSet, within: str = "") -> dict[str, torch.Tensor]:
    """The base model's ``state_dict`` with the acting adapters in its weights; new tensors only at their sites.

    ``within``: of the module of this path alone, under its names in the whole model.

    Raises:
        UnsupportedError: names the site whose adapter cannot be folded, before any work is done.
    """
    below = f"{within}." if within else ""
    merged = adapters.merged
    found = [] if merged else folds(adapters, as_live(adapters), within)
    ours = tuple(f"{path}.adapters.".lstrip(".") for site in adapters.sites for path in site.paths)
    named = adapters.model.state_dict().items()
    state = {name: tensor for name, tensor in named if name.startswith(below) and not name.startswith(ours)}
    for slot in merged.patch.slots if merged else ():
        for path in slot.paths:
            if path in state and (tensor := tensor_at(adapters.model, path)) is not None:
                state[path] = tensor.detach()
    for fold in found:
        own = {name: tensor for name in fold.replaced if (tensor := tensor_at(fold.site.module, name)) is not None}
        for name, value in fold.exact({name: widened(tensor) for name, tensor in own.items()}).items():
            paths = [f"{path}.{name}".lstrip(".") for path in fold.site.paths]
            state.update({path: rounded(value, state[path]) for path in paths if path in state})
    return state


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in fp64, of floating-point numbers; anything else as it is."""
    return tensor.detach().to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.detach()


def rounded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value`` in the dtype of ``like``, rounded once, in memory of its own."""
    return affine.rounded(value, like)


def _acting(site: Site, names: Sequence[str]) -> list[Adapter]:
    """The adapters called ``names`` at a site; one that stands in for the module is the last."""
    found = [adapter for name in names for adapter in site.of(name)]
    return sorted(found, key=lambda adapter: adapter.replaces_forward)


def _together(adapters: Sequence[Adapter]) -> tuple[Adapter, list[Adapter]]:
    """The adapter that speaks for all of a site, and the others: one that cannot be merged beside every other."""
    first = max(adapters, key=lambda a: (a.merges_alone is not None, a.acts_inside or a.replaces_forward))
    return first, [a for a in adapters if a is not first]


def _check(site: Site, model: nn.Module, names: Sequence[str]) -> None:
    adapters = _acting(site, names)
    refusal = _refusal(adapters, site.module)
    if refusal is None and any(adapter.parameter is None for adapter in adapters):
        refusal = _idle(model, site.path)
    if refusal is None and (other := _tied(site, adapters, model)):
        owner = model.get_submodule(other.rpartition(".")[0])
        there = _at(owner, names)
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
    """Why the module's tensors cannot take up what its adapters do."""
    for adapter in adapters:
        if not adapter.method.mergeable and (refusal := adapter.merge_refusal(module)):
            return refusal
    first, beside = _together(adapters)
    if first.merges_alone is not None and any(a.merges_alone != first.merges_alone for a in beside):
        return Refusal(first.merges_alone)
    if refusal := first.merge_refusal(module, beside):
        return refusal
    own = {name: tensor_at(module, name) for name in first.replaced(module, beside)}
    return next((_unwritable(name, t) for name, t in own.items() if t is not None and _unwritable(name, t)), None)


def _idle(model: nn.Module, path: str) -> Refusal | None:
    """Why a module's weight would act although the adapter at its call does not."""
    reason = bypassed.idle(model, path)
    if reason is None:
        return None
    return Refusal(f"{reason}, and merged it would", do=f"leave {path} out of the adapter's plan (exclude=)")


def _unwritable(name: str, tensor: torch.Tensor) -> Refusal | None:
    """Why nothing can be written into one of the base's tensors."""
    if tensor.is_meta:
        return Refusal(f"its {name} has no values in memory", "load the whole model into memory first")
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return Refusal(f"its {name} is a {type(tensor).__name__}, not a plain tensor")
    return None


def _tied(site: Site, adapters: Sequence[Adapter], model: nn.Module) -> str | None:
    """Another name of one of the tensors that the site's adapters replace, or None."""
    first, beside = _together(adapters)
    replaced = (tensor_at(site.module, name) for name in first.replaced(site.module, beside))
    own = {place(tensor) for tensor in replaced if isinstance(tensor, nn.Parameter)}
    inside = tuple(f"{path}.".lstrip(".") for path in site.paths)
    named = model.named_parameters(remove_duplicate=False)
    return next((name for name, p in named if place(p) in own and not name.startswith(inside)), None)


def _at(module: nn.Module, names: Sequence[str]) -> list[Adapter]:
    """The adapters called ``names`` of a module."""
    found = adapters_of(module)
    entries: list[tuple[str, Adapter]] = [] if found is None else list(found.items())  # type: ignore[arg-type]
    return [adapter for name in names for entry, adapter in entries if adapter_name(entry) == name]


def place(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory."""
    if tensor.is_meta or tensor.numel() == 0 or type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
