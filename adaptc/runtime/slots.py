"""What the slots of a model with a bank do when they run: what the hooks of its modules do outside a graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.runtime.hooks import changed_input, corrected
from adaptc.runtime.site_adapters import SiteAdapters, adapters_of


class ModelSlots:
    """The slots of one model (``capture.slots.Slots``): those of ``modules``, which have one each."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._sites: dict[int, tuple[nn.Module, SiteAdapters]] = {}
        for module in modules:
            found = adapters_of(module)
            if found is not None and found.slot is not None:
                self._sites[int(found.slot)] = module, found

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
