"""What the slots of a model with a bank do when they run: what the hooks of its modules do outside a graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.runtime.hooks import changed_input, corrected, run_site
from adaptc.runtime.site_adapters import SiteAdapters, adapters_of
from adaptc.torch_internals import global_module_hooks

#: What returns new memory, as it was when this was imported: somebody may set other functions there.
_OWN_MEMORY = frozenset({nn.Linear.forward})
_BANKS = itertools.count()


class ModelSlots:
    """The slots of one model (``capture.slots.Slots``). ``name``: that of its bank, which no other model has."""

    def __init__(self) -> None:
        self.name = f"bank {next(_BANKS)}"
        self._sites: dict[int, tuple[nn.Module, SiteAdapters]] = {}

    def look(self, modules: Iterable[nn.Module]) -> None:
        """Serve these modules, of which each has a number of its own from here on; to be called again where modules,
        hooks or methods have changed."""
        self._sites.clear()
        for module in modules:
            found = adapters_of(module)
            if found is None or found.slot is None:
                continue
            number = int(found.slot)
            if number in self._sites:  # a copy of another site
                number = max(self._sites) + 1
                found.slot = torch.tensor([number])
            self._sites[number] = module, found
            found.bank, found.returns_its_own = self.name, _returns_its_own(module)

    def correct(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Write into ``y`` what the adapters of a module make of it, its output for ``x``."""
        module, found = self._sites[number]
        if CALL.rows is None or found.rows.around is None:
            for adapter in found.live:
                adapter.correct(module, x, y)
            return
        new = corrected(module, found, (x,), {}, y)
        if new is not None and new is not y:
            y.copy_(new)

    def change_input(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What the adapters of a module make of its input; ``x`` itself where they leave it as it is."""
        return changed_input(*self._sites[number], x)  # type: ignore[no-any-return]


def _returns_its_own(module: nn.Module) -> bool:
    """Whether the output that the hook of a module gets is new memory: not what a forward or a hook of the user's has
    kept, or was given."""
    first = next(iter(module._forward_hooks.values()), None)
    others = "forward" in module.__dict__ or bool(global_module_hooks()["forward_hooks"])
    return first is run_site and not others and type(module).forward in _OWN_MEMORY
