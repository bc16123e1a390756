"""Putting adapters on modules and taking them off: hooks, taps and replaced forwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adaptc.errors import SiteError
from adaptc.methods.base import Adapter
from adaptc.runtime.hooks import SiteForward, arguments_of, run_before_site, run_forward, run_site, run_tap
from adaptc.runtime.site_adapters import SiteAdapters, Taps, adapters_of
from adaptc.runtime.weights.patch import unguard


def attach(path: str, module: nn.Module, name: str, adapter: Adapter) -> bool:
    """Put ``adapter`` on ``module`` under ``name`` (not live yet). True when the module got a hook or a forward for
    it: captured graphs do not guard on these.

    Raises:
        SiteError: the module has an attribute of its own called ``adapters``, or its forward is replaced already.
    """
    found = adapters_of(module)
    if found is None:
        check_attachable(path, module)
        found = _new(module)
    adapter.train(module.training)
    found[name] = adapter
    changed = False
    if (adapter.replaces_forward or adapter.acts_inside) and "forward" not in module.__dict__:
        module.forward = SiteForward(run_forward, module)
        changed = True
    if adapter.replaces_forward:
        return changed
    # What acts inside gets the hook too: torch's fused encoder layer reads weights without calling the modules that
    # own them, unless one of these has a hook.
    return _add_hooks(module, found, before=adapter.acts_before) or changed


def _new(module: nn.Module) -> SiteAdapters:
    found = SiteAdapters()
    found.train(module.training)
    found.arguments = arguments_of(module)
    module.adapters = found
    return found


def _add_hooks(module: nn.Module, found: SiteAdapters, *, before: bool) -> bool:
    """Put the hook on the output, and with ``before`` that on the input, on ``module``; whether one is new."""
    # Before hooks of the user on the output, and after theirs on the input: they see what they would see of a
    # wrapped layer.
    changed = False
    if found.hook_handle is None:
        found.hook_handle = module.register_forward_hook(run_site, prepend=True, with_kwargs=True)
        changed = True
    if before and found.pre_hook_handle is None:
        found.pre_hook_handle = module.register_forward_pre_hook(run_before_site, with_kwargs=True)
        changed = True
    return changed


def find_tap(path: str, tap: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module called ``tap`` that is nearest to the site ``path``: below it, or below what encloses it.

    Raises:
        SiteError: there is none.
    """
    around = path
    while True:
        found = modules.get(f"{around}.{tap}" if around else tap)
        if found is not None:
            return found
        if not around:
            near = [name for name, _ in modules[path.rpartition(".")[0]].named_children() if name != "adapters"]
            raise SiteError(
                f"{path}: no module {tap!r} to read from, at the site or around it",
                found=f"beside it: {', '.join(near)}", do="say tap=, the module whose input is read",
            )  # fmt: skip
        around = around.rpartition(".")[0]


def add_tap(module: nn.Module, name: str, tapped: nn.Module) -> bool:
    """Let the adapters of ``module`` whose tap is ``name`` read the input of ``tapped``. True when it is a new tap."""
    found = adapters_of(module)
    assert found is not None  # attached before
    if name in found.taps:
        return False
    taps = tapped.__dict__.get(Taps.KEY)
    if taps is None:
        # Before hooks of the user and before adapters on the tapped module: what its caller passed is read.
        taps = Taps(tapped.register_forward_pre_hook(run_tap, prepend=True, with_kwargs=True), arguments_of(tapped))
        tapped.__dict__[Taps.KEY] = taps
    taps.readers.append((found, name))
    found.taps[name] = tapped
    return True


def _remove_unused_taps(found: SiteAdapters) -> None:
    """Stop reading for adapters that are gone."""
    for name in [n for n in found.taps if not any(a.tap == n for a in found.values())]:
        tapped = found.taps.pop(name)
        taps = tapped.__dict__[Taps.KEY]
        taps.readers = [reader for reader in taps.readers if reader[0] is not found or reader[1] != name]
        if not taps.readers:
            taps.hook_handle.remove()
            del tapped.__dict__[Taps.KEY]


def check_attachable(path: str, module: nn.Module, *, own_forward: bool = False) -> None:
    """Raise SiteError when adapters cannot be put on ``module``; ``own_forward``: one that needs its forward."""
    if adapters_of(module) is None and hasattr(module, "adapters"):
        raise SiteError(
            f"{path} ({type(module).__name__}) already has an attribute named 'adapters'",
            expected="a free name: adapters are stored there",
            do="leave this module out of the plan, or rename the attribute",
        )
    own = module.__dict__.get("forward")
    if own_forward and own is not None and getattr(own, "func", None) is not run_forward:
        raise SiteError(
            f"{path} ({type(module).__name__}) has a forward set on the instance, so it cannot be replaced",
            do="train it through another rule, or remove the instance's forward first",
        )


def remove(module: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off ``module``; the last one leaves no trace."""
    found = adapters_of(module)
    if found is None or name not in found:
        return
    del found[name]
    found.live = tuple(a for a in found.live if any(a is b for b in found.values()))
    found.inside = tuple(a for a in found.live if a.acts_inside)
    if found.standin is not None and not any(found.standin is b for b in found.values()):
        found.standin = None
    if not any(a.replaces_forward or a.acts_inside for a in found.values()):
        own = module.__dict__.get("forward")
        if getattr(own, "func", None) is run_forward:
            del module.__dict__["forward"]
    _remove_unused_taps(found)
    if found.slot is None:
        _remove_unused_hooks(module, found)


def _remove_unused_hooks(module: nn.Module, found: SiteAdapters) -> None:
    if found.hook_handle is not None and all(a.replaces_forward for a in found.values()):
        found.hook_handle.remove()
        found.hook_handle = None
    if found.pre_hook_handle is not None and not any(a.acts_before for a in found.values()):
        found.pre_hook_handle.remove()
        found.pre_hook_handle = None
    if len(found) == 0:
        del module._modules["adapters"]


def add_slot(module: nn.Module, number: int, *, changes_input: bool) -> None:
    """Make ``module``, which has no adapters, the slot ``number`` of a bank: the hooks that adapters may need are there
    before them, and stay."""
    found = _new(module)
    found.slot = torch.tensor([number])
    _add_hooks(module, found, before=changes_input)


def remove_slot(module: nn.Module) -> None:
    """Undo :func:`add_slot`; adapters that are there stay."""
    found = adapters_of(module)
    if found is not None and found.slot is not None:
        found.slot, found.bank = None, ""
        _remove_unused_hooks(module, found)


def strip(module: nn.Module) -> None:
    """Take every adapter off ``module`` and what is inside it, and what a merge has put there."""
    unguard(module)
    for inner in list(module.modules()):
        found = adapters_of(inner)
        for name in list(found or ()):
            remove(inner, name)
        remove_slot(inner)
