"""What the calls of a compiled model have in common, and what is known of those that were made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from adaptc.capture.adapter_inputs import AdapterTensors
from adaptc.capture.backend import AdapterBackend
from adaptc.capture.call import CALL
from adaptc.capture.graphs import CapturedGraph
from adaptc.runtime.adapters import AdapterSet
from adaptc.runtime.batch import Batch, Batching
from adaptc.runtime.calls import lifts
from adaptc.runtime.calls.watch import Watch
from adaptc.runtime.options import CompileOptions
from adaptc.runtime.site_adapters import adapters_of
from adaptc.torch_internals import is_in_backward


class Epoch:
    """What was captured while the set of adapted modules, hooks and methods were the same. Dynamo does not guard on
    these: others need a fresh backend and fresh callables."""

    def __init__(self, name: str = "") -> None:
        #: Of the sites' hooks: what captures guard on.
        self.name = name
        #: None before the first call.
        self.backend: AdapterBackend | None = None
        #: The model as it was when it was last looked at, and what captured code takes for given.
        self.watch: Watch | None = None
        #: Which regions without gradients are to record them.
        self.lifts = lifts.Lifts()
        #: Path of each block that is captured by itself -> the name of those it shares its graphs with.
        self.regions: dict[str, str] = {}
        #: Modules that may make a cache for the blocks.
        self.stacks: list[nn.Module] = []
        #: What captures an entry point, whole or by block.
        self.entries: dict[tuple[str, bool], Callable[..., Any]] = {}
        #: What captures one kind of block, by its name in ``regions``.
        self.blocks: dict[str, Callable[..., Any]] = {}
        #: Kinds of calls that are captured whole because a call of theirs was found to need it.
        self.whole: set[tuple[object, ...]] = set()
        #: Signatures of the live adapters that there were.
        self.signatures: set[tuple[object, ...]] = set()
        #: ``id`` of the site-id tensors whose hooks ran outside a graph, and of those
        #: that did so in a call of a kind that is captured now.
        self.eager: set[int] = set()
        self.once: set[int] = set()

    @property
    def graphs(self) -> list[CapturedGraph]:
        return [] if self.backend is None else self.backend.graphs

    def fits(self, now: Watch) -> bool:
        """Whether what was captured may run on the model as it is now."""
        return self.watch is not None and self.watch.given.holds(now.given)

    def follow(self, now: Watch) -> None:
        """Compare the model with what it is now from here on."""
        if self.watch is not None:
            now.given.add(self.watch.given)
        self.watch = now


class Calls:
    """A compiled model as its calls and reports see it: its adapters, the options, and what was captured. A copy of it
    has captured nothing yet."""

    def __init__(self, adapters: AdapterSet, options: CompileOptions) -> None:
        self.adapters, self.options = adapters, options
        self._start()

    def _start(self) -> None:
        self.epoch = Epoch()
        #: Whether blocks were found to need graphs of their own, each one: in every epoch.
        self.copies_differ = False
        #: Whether the last call was captured whole, for blocks that its backward computes again.
        self.last_was_whole = False
        self.batching = Batching()
        #: The batch of the last call with gradients, and its rows; None where it was in none.
        self.differentiated: tuple[Batch, torch.Tensor] | None = None
        #: Signature of an adapter -> its place in batches, among others that have rows there.
        self.order: dict[object, int] = {}
        self.counts = {"epochs": 0, "calls": 0, "recompile_limits_hit": 0, "signatures": 0, "past_graphs": 0}

    def call(self, entry: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``, an entry point of the model, as captured in this epoch."""
        raise NotImplementedError

    def block(self, name: str) -> Callable[..., Any]:
        """What captures the blocks called ``name``; takes the block and its arguments."""
        raise NotImplementedError

    @contextlib.contextmanager
    def as_differentiated(self) -> Iterator[None]:
        """A block that computes again, in a backward, what the last call with gradients did: by that one's rows. If it
        was of another call, what the block saves tells so (``capture.recompute``)."""
        now, then = self.batching.current, self.differentiated
        if not is_in_backward() or now is (None if then is None else then[0]):
            yield
        elif then is not None:
            with then[0].in_place(then[1]):
                yield
        else:
            rows, CALL.rows = CALL.rows, None
            try:
                yield
            finally:
                CALL.rows = rows

    def stop_sharing(self) -> None:
        """Capture the model whole from now on: its blocks are no copies of each other."""
        self.copies_differ, self.epoch.regions = True, {}

    @property
    def graphs(self) -> list[CapturedGraph]:
        """The graphs captured in this epoch."""
        return self.epoch.graphs

    def slot_tensors(self) -> list[tuple[torch.Tensor, str]]:
        """The number of each slot of a bank, with the path of its site."""
        found = [(adapters_of(site.module), site.path) for site in self.adapters.sites]
        return [(one.slot, path) for one, path in found if one is not None and one.slot is not None]

    def adapter_tensors(self) -> AdapterTensors:
        """The tensors by which a captured graph's inputs are told to be an adapter's."""
        adapters = [(a, site.path) for site in self.adapters.sites for a in site.adapters.values()]
        return AdapterTensors(
            [*((a.site_id, path) for a, path in adapters), *self.slot_tensors()],
            [(p, path) for a, path in adapters for p in a.parameters() if p.requires_grad],
            lifts.tensors(self.adapters.model, self.epoch.lifts),
            frozenset(self.epoch.lifts.own),
        )

    def site_paths(self) -> dict[int, str]:
        """``id`` of every adapter's site-id tensor, and of every slot's number -> module path."""
        adapters = {id(a.site_id): site.path for site in self.adapters.sites for a in site.adapters.values()}
        return {**adapters, **{id(number): path for number, path in self.slot_tensors()}}

    def eager_sites(self) -> list[str]:
        """Sites whose adapter ran outside a captured graph: right values, but not rewritten."""
        paths = self.site_paths()
        return sorted({paths[i] for i in self.epoch.eager if i in paths})

    def idle_sites(self) -> list[str]:
        """Sites of live adapters that no call has reached yet."""
        epoch = self.epoch
        ran = epoch.eager | epoch.once | (epoch.backend.ran if epoch.backend else set())
        # A module that is trained in full has no anchor: nothing tells whether its copy ran.
        live = [
            (site.path, [a for n in self.adapters.live for a in site.of(n) if not a.replaces_forward])
            for site in self.adapters.sites
        ]
        slots = {path: id(number) for number, path in self.slot_tensors()}
        return [
            path
            for path, adapters in live
            if adapters and slots.get(path) not in ran and not any(id(a.site_id) in ran for a in adapters)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # Captured code belongs to this object and process; a copy captures anew.
        return {"adapters": self.adapters, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
