"""The captured forms of a model's entry points, one epoch at a time."""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.capture.backend import JOINT_BACKENDS, AdapterBackend, BackendOptions, prepare
from adaptc.capture.graphs import CapturedGraph
from adaptc.errors import RecompileLimitWarning, UnsupportedError
from adaptc.methods import quantised
from adaptc.runtime import attach
from adaptc.runtime.calls import output_hooks, regions, warmup
from adaptc.runtime.calls.alike import Copies
from adaptc.runtime.calls.lifts import Lifts, lifts_of
from adaptc.runtime.calls.prologue import Capture, EntryMethod, Prologue, compiled
from adaptc.runtime.calls.watch import Given, Watch
from adaptc.torch_internals import without_size_memory

if TYPE_CHECKING:
    from adaptc.handle import Handle


_EPOCHS = itertools.count()
#: What an epoch consists of: the attributes of ``Captures`` that are put by and taken up again with it.
_OF_EPOCH = (
    "backend", "eager", "once", "regions", "_name", "_callables", "_blocks", "_whole", "_stacks", "_signatures",
)  # fmt: skip
#: How many epochs are kept beside the one that is used.
_KEPT = 8


class Captures:
    """Backend, callables and counters of a model.

    An epoch ends when the set of adapted modules changes: Dynamo does not guard on hooks, so new ones need a
    fresh backend and fresh callables. It also ends when hooks or methods of the user change, and is then kept, for when
    they are as they were.
    """

    def __init__(self, handle: Handle, options: BackendOptions | None = None) -> None:
        self.handle = handle
        self.options = options or handle.options.backend
        self.backend: AdapterBackend | None = None
        self._callables: dict[tuple[str, bool], Capture] = {}
        #: What captures one kind of block, by its name in ``regions``.
        self._blocks: dict[str, Callable[..., Any]] = {}
        #: Which regions without gradients are to record them, in this epoch.
        self.lifts = Lifts()
        #: Path of each block that is captured by itself -> the name of those it shares its graphs with.
        self.regions: dict[str, str] = {}
        #: Modules that may make a cache for the blocks.
        self._stacks: list[nn.Module] = []
        #: Kinds of calls that are captured whole because a call of theirs was found to need it.
        self._whole: set[tuple[object, ...]] = set()
        #: Whether blocks were found to need graphs of their own, each one: in every epoch.
        self.copies_differ = False
        #: Whether the last call was captured whole, for blocks that its backward computes again.
        self.last_was_whole = False
        #: Whether what a training step needs was begun with.
        self._prepared = False
        #: (path, module) of layers in 4-bit codes; None: not looked for yet.
        self._packable: list[tuple[str, nn.Module]] | None = None
        self._signatures: set[tuple[object, ...]] = set()
        #: ``id`` of the site-id tensors whose hooks ran outside a graph, and of those
        #: that did so in a call of a kind that is captured now.
        self.eager: set[int] = set()
        self.once: set[int] = set()
        #: Of the sites' hooks: what captures guard on.
        self._name = ""
        #: What this epoch's captures take for given; None before its first call.
        self._watch: Watch | None = None
        self._given: Given | None = None
        #: Epochs that ended because of hooks or methods, the last used one at the end.
        self._kept: list[tuple[Given, dict[str, Any]]] = []
        #: Whether it was said that more of these were captured than are kept.
        self._told = False
        self.counts = {"epochs": 0, "calls": 0, "recompile_limits_hit": 0, "signatures": 0, "past_graphs": 0}

    def call(self, entry: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``, an entry point of the model, as captured in this epoch."""
        drop_embedding_hooks(self.handle.model)
        self._check_gradients()
        if self._watch is not None and self._watch.sees_a_change():
            self._follow()
        backend = self._open()
        self.counts["calls"] += 1
        if not self.regions:
            return self._capture(entry, function, backend)((), args, kwargs)
        model = self.handle.model
        kind = (entry, *regions.kind_of_call(model, kwargs))
        whole = kind in self._whole or regions.wants_whole(model, self._stacks, args, kwargs)
        return self._capture(entry, function, backend if whole else None)(kind, args, kwargs)

    def _capture(self, entry: str, function: Callable[..., Any], backend: AdapterBackend | None) -> Capture:
        """``function`` captured whole by ``backend``, or as it is, its blocks captured."""
        self.last_was_whole = backend is not None
        key = (entry, self.last_was_whole)
        if key not in self._callables:
            self._callables[key] = Capture(self.handle, function, backend)
        return self._callables[key]

    def block(self, name: str) -> Callable[..., Any]:
        """What captures the blocks called ``name``; takes the block and its arguments."""
        backend = self._open()
        if name not in self._blocks:
            blocks, kinds = regions.copies(self.handle.model, self.regions, name)
            capture: Callable[..., Any] = backend
            if self.handle.options.regional == "auto":
                # The first block's input may need no gradient.
                capture = Copies(self, backend, blocks, kinds + 1)
            self._blocks[name] = compiled(self.handle, regions.run_block, capture, copies=len(blocks))
        return self._blocks[name]

    def _open(self) -> AdapterBackend:
        """The backend of this epoch, which begins with its first call."""
        if self.backend is None:
            output_hooks.install(self.handle.model)
            self.note_signature()
            self.handle.adapters.check_weights()
            self.lifts = lifts_of(self.handle)
            self.backend = AdapterBackend(self.handle.pipeline(), self.options, self.handle.adapter_tensors)
            self.regions = regions.arm(self.handle)
            self._stacks = regions.caching_stacks(self.handle.model, self.regions)
            self._watch = Watch(self.handle.model)
            self._given = self._watch.given
            self.counts["epochs"] += 1
        if not self._prepared and torch.is_grad_enabled():
            self._prepared = True
            prepare(self.options, self.handle.model.parameters())
        return self.backend

    def _check_gradients(self) -> None:
        """Raise where a step would be computed without the gradients that flow through the base."""
        if self._packable is None:
            modules = self.handle.model.named_modules()
            self._packable = [(path, m) for path, m in modules if quantised.may_lose_gradients(m)]
        if not (self._packable and self.handle.model.training and torch.is_grad_enabled()):
            return
        reasons = ((path, quantised.loses_gradients(module)) for path, module in self._packable)
        path, refusal = next((pair for pair in reasons if pair[1] is not None), ("", None))
        if refusal is not None:
            raise UnsupportedError(f"{path}: {refusal.reason}: no gradient flows through", do=refusal.do)

    def note_signature(self) -> bool:
        """Remember the live adapters' signature; True when graphs were captured and none fits it."""
        signature = self.handle.adapters.signature()
        if signature in self._signatures:
            return False
        self._signatures.add(signature)
        self.counts["signatures"] += 1
        return self.backend is not None

    def lifts_changed(self) -> bool:
        """Whether graphs were captured, and the live adapters ask for other regions to record gradients than those did
        that were live then."""
        return self.backend is not None and lifts_of(self.handle) != self.lifts

    def after_call(self, found: tuple[object, ...] | None, eager: set[int], limits: list[str]) -> None:
        """Count a call. ``found``: its kind, if it was found to need capturing whole and ran op by op from there."""
        if found is None:
            self.eager |= eager
        else:
            self._whole.add(found)
            self.once |= eager
        self.counts["recompile_limits_hit"] += len(limits)

    def stop_sharing(self) -> None:
        """Capture the model whole from now on: its blocks are no copies of each other."""
        self.copies_differ, self.regions = True, {}

    def run_ahead(self, inputs: Any) -> None:
        """Capture what a call with ``inputs`` needs, by one that leaves no trace."""
        known = len(self._whole)
        warmup.run_once(self.handle.model, inputs)
        if len(self._whole) > known:
            warmup.run_once(self.handle.model, inputs)

    def new_epoch(self) -> None:
        """Forget captured graphs."""
        for _, kept in self._kept:
            self.counts["past_graphs"] += len(kept["backend"].graphs)
        self._kept.clear()
        if self.backend is not None:
            self.counts["past_graphs"] += len(self.backend.graphs)
        self._packable = None
        self._begin()

    def _begin(self) -> None:
        """Make this an epoch of which no call was made."""
        self.backend, self.eager, self.regions, self._callables, self._blocks = None, set(), {}, {}, {}
        self._whole, self._stacks, self._signatures, self.once = set(), [], set(), set()
        self._watch = self._given = None
        self._call(str(next(_EPOCHS)))

    def _call(self, name: str) -> None:
        """Tell the sites the epoch's name."""
        self._name = name
        for site in self.handle.sites:
            adapters = attach.adapters_of(site.module)
            if adapters is not None:
                adapters.epoch = name

    def _follow(self) -> None:
        """Go on with what was captured with the hooks and the methods that the model has now, or begin an epoch."""
        self._watch = Watch(self.handle.model)
        now = self._watch.given
        assert self._given is not None  # it was called
        if self._given.holds(now):
            self._given.add(now)
        else:
            self._name = next((a.epoch for s in self.handle.sites if (a := attach.adapters_of(s.module))), "")
            self._kept.append((self._given, {name: getattr(self, name) for name in _OF_EPOCH}))
            found = next((kept for kept in self._kept if kept[0].holds(now)), None)
            if found is None:
                self._begin()
                self._drop_old()
                return
            self._kept.remove(found)
            self._given, state = found
            self._given.add(now)
            self.__dict__.update(state)
            self._call(self._name)
        if self.regions:
            self.regions = regions.arm(self.handle)

    def _drop_old(self) -> None:
        """Keep the last epochs only; say so once where there have been many."""
        if len(self._kept) <= _KEPT:
            return
        _, state = self._kept.pop(0)
        self.counts["past_graphs"] += len(state["backend"].graphs)
        if not self._told:
            self._told = True
            message = (
                f"hooks or methods of the model's classes changed for the {_KEPT + 1}th time, and it was captured anew"
                " each time (set them once, or set and remove the same functions)"
            )
            warnings.warn(RecompileLimitWarning(message), stacklevel=6)


def preview(handle: Handle, inputs: Any) -> list[CapturedGraph]:
    """Capture and rewrite the graphs of ``inputs`` as a call would, op by op where kernels would be compiled."""
    options = handle.options.backend
    if options.name in JOINT_BACKENDS:
        options = dataclasses.replace(options, name="aot_eager", mode=None, options={})
    own, handle.captures = handle.captures, Captures(handle, options)
    try:
        with without_size_memory():
            handle.captures.run_ahead(inputs)
        return [] if handle.captures.backend is None else handle.captures.backend.graphs
    finally:
        handle.captures = own


def arm(handle: Handle) -> list[str]:
    """Install the prologue on the model and on the entry points that bypass its forward; returns their names."""
    model = handle.model
    Prologue(handle, model, "")
    names = []
    encoder = _separate_encoder(model)
    if encoder is not None:
        Prologue(handle, encoder, "encoder")
        names.append("encoder")
    for name in _feature_methods(model):
        setattr(model, name, EntryMethod(handle, name))
        names.append(name)
    return names


def disarm(model: nn.Module) -> None:
    """Undo :func:`arm`."""
    for module in model.modules():
        prologue = module.__dict__.get(Prologue.KEY)
        if isinstance(prologue, Prologue) and prologue.handle.model is model:
            prologue.disarm()
    for name, value in list(model.__dict__.items()):
        if isinstance(value, EntryMethod):
            del model.__dict__[name]


def _separate_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder that ``generate`` calls by itself on encoder-decoder models of transformers."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get = getattr(model, "get_encoder", None)
    encoder = get() if callable(get) else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _feature_methods(model: nn.Module) -> list[str]:
    """Methods such as CLIP's ``get_text_features``, which call a tower without the model's forward."""
    return sorted(n for n in dir(type(model)) if re.fullmatch(r"get_\w+_features", n))


def drop_embedding_hooks(model: nn.Module) -> None:
    """Remove the hook that transformers puts on frozen embeddings for checkpointing.

    ``activation_checkpointing_enable`` makes the embeddings' output require a gradient, which breaks the graph;
    only re-entrant checkpointing needs it.
    """
    if not model.__dict__.get("_require_grads_hooks"):
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            return
    model.disable_input_require_grads()  # type: ignore[operator]
