"""Weights with the live adapters folded in: W + s B A, in fp64, rounded once to the weight's dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from adaptc.errors import UnsupportedError
from adaptc.methods import linear, quantised
from adaptc.methods.base import Adapter
from adaptc.methods.lora.method import LoRA
from adaptc.methods.lora.site import SiteAdapter
from adaptc.methods.trainable_tokens import TokensAdapter
from adaptc.runtime import processes
from adaptc.runtime.attach import SiteAdapters, adapters_of

if TYPE_CHECKING:
    from adaptc.handle import Handle
    from adaptc.runtime.adapters import Site

#: Rows of the identity that go through a site at a time: bounds what is held beside the weight.
_ROWS = 1024


def folded_state(handle: Handle, within: str = "") -> dict[str, torch.Tensor]:
    """The base model's ``state_dict`` with the live adapters in its weights; new tensors only at their sites.

    ``within``: of the module of this path alone, under its names in the whole model.

    Raises:
        UnsupportedError: names the site whose adapter cannot be folded, before any work is done.
    """
    below = f"{within}." if within else ""
    model = handle.model
    sites = [site for site in handle.sites if _live(site) and f"{site.path}.".startswith(below)]
    if processes.is_sharded(model):
        raise UnsupportedError(
            "a sharded model's weights cannot be merged",
            do="model.adaptc.save(directory) in all processes, then load it into a whole model and merge there",
        )
    for site in sites:
        _check(site, model)
    ours = tuple(f"{path}.adapters.".lstrip(".") for site in handle.sites for path in site.paths)
    named = model.state_dict().items()
    state = {name: tensor for name, tensor in named if name.startswith(below) and not name.startswith(ours)}
    for site in sites:
        for local, value in folded(site).items():
            state.update({name: value for path in site.paths if (name := f"{path}.{local}") in state})
    return state


def fold_in(handle: Handle) -> None:
    """Write the folded weights into the model's own; all are computed before the first is written.

    Raises:
        UnsupportedError: as :func:`folded_state`; nothing has changed then.
    """
    state = folded_state(handle)
    named = handle.model.state_dict()
    for name, value in state.items():
        if value.data_ptr() != named[name].data_ptr():
            named[name].copy_(value)


def folded(site: Site) -> dict[str, torch.Tensor]:
    """The site's tensors (name below its path -> value) that differ with its live adapters folded in."""
    module, adapters = site.module, _live(site)
    standin = cast(SiteAdapters, adapters_of(module)).standin
    if standin is not None:
        return dict(cast(nn.Module, standin.copy).state_dict())
    if all(isinstance(a, TokensAdapter) for a in adapters):
        weight = _stored(module)
        for adapter in cast(list[TokensAdapter], adapters):
            weight = adapter.merged(weight)
        return {"weight": weight}
    if all(isinstance(a, SiteAdapter) for a in adapters):
        return _with_updates(module, cast(list[SiteAdapter], adapters))
    if all(a.method.kind == "bias" for a in adapters):
        return {"bias": _rounded(cast(torch.Tensor, adapters[-1].bias), module.bias)}
    run = _map(module, adapters)
    points = torch.eye(linear.features(module)[0], dtype=torch.float64, device=_stored(module).device)
    bias = run(torch.zeros_like(points[:1]))[0]
    if all(isinstance(a.method, LoRA) and not a.method.dora for a in adapters):
        # The sum itself, where the map's values would add the bias and take it away again.
        weight = _stored(module).double() + sum(cast(Any, a).delta() for a in adapters)
    else:
        weight = torch.cat([run(rows) - bias for rows in torch.split(points, _ROWS)]).mT
    values = {"weight": weight.mT if linear.is_conv1d(module) else weight}
    if getattr(module, "bias", None) is not None:
        values["bias"] = bias
    return {name: _rounded(value, getattr(module, name)) for name, value in values.items()}


def _with_updates(module: nn.Module, adapters: Sequence[SiteAdapter]) -> dict[str, torch.Tensor]:
    """The module's weights with their updates, by their names in it."""
    total: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        for name, update in adapter.deltas().items():
            total[name] = total.get(name, module.get_parameter(name).detach().double()) + update
    return {name: _rounded(value, module.get_parameter(name)) for name, value in total.items()}


def _map(module: nn.Module, adapters: Sequence[Adapter]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a linear site and its adapters compute together, in fp64 and eval mode.

    A method that can be merged is affine in its input, so that the map's values at zero and at the rows of the
    identity are its bias and its weight.
    """
    stored, bias = cast(torch.Tensor, module.weight), getattr(module, "bias", None)
    inputs, outputs = linear.features(module)
    # Of the module's own class where that says how the weight is stored.
    own: type[Any] = type(module)
    new: Any = own(outputs, inputs) if linear.is_conv1d(module) else nn.Linear(inputs, outputs, bias is not None)
    plain = new.to(stored.device, torch.float64)
    with torch.no_grad():
        plain.weight.copy_(stored)
        if bias is not None:
            plain.bias.copy_(bias)
    copies = [copy.deepcopy(a).double().eval() for a in adapters]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for adapter in copies:
                if adapter.acts_before:
                    x = adapter.apply_before(plain, x)
            y = plain(x)
            for adapter in copies:
                y = adapter.apply_to(plain, x, y)
            return cast(torch.Tensor, y)

    return run


def _live(site: Site) -> list[Adapter]:
    found = cast(SiteAdapters, adapters_of(site.module))
    return [*found.live, *([] if found.standin is None else [found.standin])]


def _live_at(path: str, model: nn.Module) -> list[Adapter]:
    found = adapters_of(model.get_submodule(path))
    return [] if found is None else list(found.live)


def _trained_rows(adapters: Sequence[Adapter]) -> list[int]:
    """Which tensors replace rows of a weight, in order."""
    return [id(a.values) if isinstance(a, TokensAdapter) else 0 for a in adapters]


def _stored(module: nn.Module) -> torch.Tensor:
    weight = cast(torch.Tensor, module.weight).detach()
    return weight.mT if linear.is_conv1d(module) else weight


def _rounded(value: torch.Tensor, like: Any) -> torch.Tensor:
    return value.detach().to(like.dtype).contiguous().clone()


def _check(site: Site, model: nn.Module) -> None:
    adapters = _live(site)
    reason = None
    fixed = [a for a in adapters if not (a.method.mergeable or a.replaces_forward)]
    if fixed:
        reason = f"{fixed[0].method.kind} cannot be folded into a weight"
    elif any(a.replaces_forward for a in adapters):
        reason = "other adapters act around a fully trained module" if len(adapters) > 1 else None
    elif all(isinstance(a, TokensAdapter) for a in adapters):
        other = _tied(site, model)
        if other is None or _trained_rows(adapters) == _trained_rows(_live_at(other.rpartition(".")[0], model)):
            return
    elif any(isinstance(a, TokensAdapter) for a in adapters):
        reason = "other adapters act beside trained rows of its weight"
    elif all(isinstance(a, SiteAdapter) for a in adapters):
        refusals = [cast(SiteAdapter, a).merge_refusal() for a in adapters]
        reason = next((r for r in refusals if r), None)
    elif any(isinstance(a, SiteAdapter) for a in adapters):
        reason = "other adapters act beside the update of its weights"
    elif not linear.is_linear(site.module):
        if any(a.method.kind != "bias" for a in adapters):
            reason = f"{type(site.module).__name__} is not a linear layer"
    elif any(a.method.kind != "bias" for a in adapters) and (how := quantised.describe(site.module)):
        raise UnsupportedError(
            f"{site.path}: the adapter ({adapters[0].method.kind}) cannot be merged: its weight is quantised",
            found=f"{how}: the sum would be rounded to its codes, by as much as an adapter moves a weight",
            do="save the adapter by itself, and merge it into the base without quantisation",
        )  # fmt: skip
    elif not cast(torch.Tensor, site.module.weight).is_floating_point() and quantised.describe(site.module) is None:
        reason = f"its weight is {site.module.weight.dtype}"
    elif getattr(site.module, "bias", None) is None and _moves_zero(site.module, adapters):
        reason = "the adapter adds a constant, and the layer has no bias to take it"
    if reason is None and (other := _tied(site, model)):
        reason = f"its weight is also {other}, which has no adapter, or another one"
    if reason is not None:
        raise UnsupportedError(
            f"{site.path}: the adapter cannot be merged", found=reason,
            do="save the adapter by itself (merge=False)",
        )  # fmt: skip


def _moves_zero(module: nn.Module, adapters: Sequence[Adapter]) -> bool:
    zero = torch.zeros(1, linear.features(module)[0], dtype=torch.float64, device=_stored(module).device)
    return bool(_map(module, adapters)(zero).any())


def _tied(site: Site, model: nn.Module) -> str | None:
    """Another name of one of the site's own tensors, or None."""
    inner = any(a.replaces_forward or a.acts_inside for a in _live(site))
    own = {id(p) for p in site.module.parameters(recurse=inner)}
    inside = tuple(f"{path}." for path in site.paths)
    named = model.named_parameters(remove_duplicate=False)
    return next((name for name, p in named if id(p) in own and not name.startswith(inside)), None)
