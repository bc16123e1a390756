"""Which regions without gradients record them after all: those that a plan names, and those of a few classes.

A stop-gradient is part of what a model computes. A class stands in the table below where it is none: where the class
runs a part without gradients only because it takes the part for frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from adaptc.plan.lifts import lifted_modules
from adaptc.plan.tree import ModuleTree, self_and_parents

if TYPE_CHECKING:
    from adaptc.capture.adapter_inputs import Owned
    from adaptc.runtime.adapters import AdapterSet

#: Class -> the part of it that it runs without gradients, and why that is no stop-gradient.
_FROZEN_PARTS = {
    "transformers.models.clipseg.modeling_clipseg.CLIPSegForImageSegmentation": (
        "clip",
        "CLIPSeg takes its CLIP towers for frozen, so that adapters in them could never learn",
    ),
}


@dataclasses.dataclass(frozen=True)
class Lifts:
    """``asked``: paths of the modules that plans name. ``own``: site in a part that its class takes for frozen -> why
    its region is lifted."""

    asked: tuple[str, ...] = ()
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.asked or self.own)

    def is_asked(self, path: str) -> bool:
        """Whether the module at ``path``, or one around it, is named."""
        return any(outer in self.asked for outer in [*self_and_parents(path), ""])


def lifts_of(adapters: AdapterSet) -> Lifts:
    """What the live adapters' plans and the model's classes ask for; where none is live, every adapter's."""
    if not any(one.name == "lift_no_grad" for one in adapters.pipeline().passes):
        return Lifts()
    plans = [adapters.records[name].plan for name in adapters.live or adapters.records]
    selectors = [s for plan in plans if plan.passes is not None for s in plan.passes.lift_no_grad]
    asked = lifted_modules(selectors, ModuleTree(adapters.model)) if selectors else []
    return Lifts(tuple(asked), dict(_own(adapters)))


def _own(adapters: AdapterSet) -> Iterable[tuple[str, str]]:
    for path, module in adapters.model.named_modules():
        row = _row(module)
        if row is not None:
            part, why = row
            part = f"{path}.{part}".lstrip(".")
            yield from ((site.path, why) for site in adapters.sites if part in self_and_parents(site.path))


def _row(module: nn.Module) -> tuple[str, str] | None:
    """What the table says of a module; nothing of a subclass that has a forward of its own."""
    for kind in type(module).__mro__:
        row = _FROZEN_PARTS.get(f"{kind.__module__}.{kind.__qualname__}")
        if row is not None and type(module).forward is kind.forward:  # type: ignore[attr-defined]
            return row
    return None


def tensors(model: nn.Module, lifts: Lifts) -> list[Owned]:
    """Every tensor of the modules that are named, with the path of its module."""
    found: list[Owned] = []
    for path in lifts.asked:
        module = model.get_submodule(path)
        found += [(tensor, path) for tensor in (*module.parameters(), *module.buffers())]
    return found


def cover(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Modules to name for the sites ``paths``: the outermost that hold none of the ``others``."""
    apart = {outer for path in others for outer in self_and_parents(path)}
    return list(dict.fromkeys(_outermost(path, apart) for path in paths))


def _outermost(path: str, apart: set[str]) -> str:
    return [outer for outer in self_and_parents(path) if outer not in apart][-1]
