"""Where the adapters of a module are kept, and who reads another module's input."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from adaptc.errors import UnsupportedError
from adaptc.methods.base import Adapter


class SiteAdapters(nn.ModuleDict):
    """The adapters of one module, by name. ``live``: those that act, in order.

    ``live`` is plain data that hooks read: Dynamo guards on how many there are and on their tensors' shapes,
    not on which objects they are, so switching among equal ones does not recompile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: tuple[Adapter, ...] = ()
        #: Those of them that act inside the module's forward.
        self.inside: tuple[Adapter, ...] = ()
        #: The live adapter that stands in for the module itself, or None.
        self.standin: Adapter | None = None
        #: Changes with the set of sites. Hooks read it so that every capture, a user's own too, guards on it: Dynamo
        #: does not guard on hooks that other modules get later. Text, because it may make an input of a number.
        self.epoch = ""
        self.hook_handle: Any = None
        self.pre_hook_handle: Any = None
        #: Names of the arguments of the module's forward, in order: which of several its adapters read.
        self.arguments: tuple[str, ...] = ()
        #: Name of a tap -> the module whose input it reads.
        self.taps: dict[str, nn.Module] = {}
        self.rows = SiteRows()
        #: In a bank: int64 (1,) on the CPU, which slot this module is. Not a buffer: it stays where it is.
        self.slot: torch.Tensor | None = None
        #: The name of that bank in this process.
        self.bank = ""
        #: Whether what the module returns is nobody else's, so that it may be written.
        self.returns_its_own = False
        #: Whether what the module reads was seen to have the tokens of row 0 first, then those of row 1, ....
        self.is_flat = False

    def __setattr__(self, name: str, value: Any) -> None:
        # `standin` is an alias of an entry: registering it again would double its state_dict keys.
        if name == "standin":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bank": ""}  # a copy is another model's, which has to look at it first

    def __prepare_scriptable__(self) -> SiteAdapters:
        """Called by ``torch.jit.script`` on every module of what it is given."""
        raise UnsupportedError(
            "torch.jit.script cannot read a model with adapters: they act by hooks on its modules",
            do="torch.jit.trace(model, inputs), torch.export.export(model, inputs), or model.adaptc.merge_and_unload()"
            " first",
        )

    def make_live(self, adapters: Sequence[Adapter]) -> None:
        """Let ``adapters`` (entries of this dict) act, in this order."""
        self.live = tuple(a for a in adapters if not a.replaces_forward)
        self.inside = tuple(a for a in self.live if a.acts_inside)
        self.standin = next((a for a in adapters if a.replaces_forward), None)


class SiteRows(threading.local):
    """What acts at a module in a batch of several adapters, one state per thread; None outside of one."""

    def __init__(self) -> None:
        # Set on the object: Dynamo does not guard on what only the class has.
        #: For each adapter of the batch, in order, what it has here that corrects the module's input or output.
        self.around: tuple[tuple[Adapter, ...], ...] | None = None
        #: The same of what acts inside the module or in its place; None where nothing does.
        self.inside: tuple[tuple[Adapter, ...], ...] | None = None
        #: What computes the module in the place of its forward where no row has something inside it.
        self.base: Adapter | None = None

    def __reduce__(self) -> tuple[type[SiteRows], tuple[()]]:
        return SiteRows, ()  # copies of a model are in no batch

    def put(self, acting: RowAdapters | None) -> None:
        """Let ``acting`` act; None: as outside of a batch."""
        self.around, self.inside, self.base = (None, None, None) if acting is None else acting

    def now(self) -> RowAdapters | None:
        """What acts; None outside of a batch."""
        return None if self.around is None else RowAdapters(self.around, self.inside, self.base)


class RowAdapters(NamedTuple):
    """What acts at a module in a batch: as in :class:`SiteRows`."""

    around: tuple[tuple[Adapter, ...], ...]
    inside: tuple[tuple[Adapter, ...], ...] | None
    base: Adapter | None

    @staticmethod
    def of(groups: Sequence[Sequence[Adapter]], attached: Iterable[Adapter]) -> RowAdapters:
        """``groups``: for each adapter of the batch all that the module has of it; ``attached``: all that it has."""
        inside = tuple(tuple(a for a in group if a.acts_inside or a.replaces_forward) for group in groups)
        around = tuple(tuple(a for a in group if not (a.acts_inside or a.replaces_forward)) for group in groups)
        base = next((a for a in attached if a.rounds_base), None)
        return RowAdapters(around, inside if any(inside) or base is not None else None, base)


class Taps:
    """On a module whose input adapters elsewhere read or change, in its ``__dict__``: who, and by which name."""

    KEY = "_adaptc_taps"

    def __init__(self, hook_handle: Any, arguments: tuple[str, ...]) -> None:
        self.readers: list[tuple[SiteAdapters, str]] = []
        self.hook_handle = hook_handle
        self.arguments = arguments


def entry_of(name: str, level: int, parameter: str | None = None) -> str:
    """The key of an adapter at a site: its name, the module's parameter that it is for, and a number for what stacked
    rules added."""
    parts = [name, *([] if parameter is None else [parameter]), *([] if level == 0 else [str(level)])]
    return "~".join(parts)


def adapter_name(entry: str) -> str:
    """The adapter's name of a key."""
    return entry.partition("~")[0]


def adapters_of(module: nn.Module) -> SiteAdapters | None:
    """The adapters attached to ``module``, or None."""
    found = module._modules.get("adapters")
    return found if isinstance(found, SiteAdapters) else None
