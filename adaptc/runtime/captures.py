"""The captured forms of a model's entry points, one epoch at a time."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.codegen.backend import JOINT_BACKENDS, AdapterBackend, BackendOptions, prepare
from adaptc.codegen.graphs import CapturedGraph
from adaptc.codegen.torch_internals import without_size_memory
from adaptc.errors import UnsupportedError
from adaptc.methods import quantised
from adaptc.runtime import attach, output_hooks, regions, warmup
from adaptc.runtime.lifts import Lifts, lifts_of
from adaptc.runtime.prologue import Capture, EntryMethod, Prologue, compiled
from adaptc.runtime.restart import Before

if TYPE_CHECKING:
    from adaptc.runtime.handle import Handle


_EPOCHS = itertools.count()


class Captures:
    """Backend, callables and counters of a model.

    An epoch ends when the set of adapted modules changes: Dynamo does not guard on hooks, so new ones need a
    fresh backend and fresh callables.
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
        #: Kinds of calls that a block found to need capturing whole, and kinds of which one ran to its end by block.
        self._whole: set[tuple[object, ...]] = set()
        self._by_block: set[tuple[object, ...]] = set()
        #: Whether the last call was captured whole, for blocks that its backward computes again.
        self.last_was_whole = False
        #: Whether what a training step needs was begun with.
        self._prepared = False
        #: (path, module) of layers in 4-bit codes; None: not looked for yet.
        self._packable: list[tuple[str, nn.Module]] | None = None
        self._signatures: set[tuple[object, ...]] = set()
        #: ``id`` of the site-id tensors whose hooks ran outside a graph.
        self.eager: set[int] = set()
        self.counts = {"epochs": 0, "calls": 0, "recompile_limits_hit": 0, "signatures": 0, "past_graphs": 0}

    def call(self, entry: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``, an entry point of the model, as captured in this epoch."""
        drop_embedding_hooks(self.handle.model)
        self._check_gradients()
        backend = self._open()
        self.counts["calls"] += 1
        model = self.handle.model
        kind = (entry, *regions.kind_of_call(model, kwargs))
        if not self.regions or kind in self._whole or regions.wants_whole(model, args, kwargs):
            return self._capture(entry, function, backend)(*args, **kwargs)
        eager, before = set(self.eager), None if kind in self._by_block else Before(model)
        try:
            result = self._capture(entry, function, None)(*args, **kwargs)
            self._by_block.add(kind)
            return result
        except regions.CaptureWhole:
            self._whole.add(kind)
            self.eager = eager
        if before is not None:
            before.restore()
        return self._capture(entry, function, backend)(*args, **kwargs)

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
            self._blocks[name] = compiled(self.handle, regions.run_block, backend)
        return self._blocks[name]

    def _open(self) -> AdapterBackend:
        """The backend of this epoch, which begins with its first call."""
        if self.backend is None:
            output_hooks.install(self.handle.model)
            self.note_signature()
            self.lifts = lifts_of(self.handle)
            self.backend = AdapterBackend(self.handle.pipeline(), self.options, self.handle.adapter_tensors)
            self.regions = regions.arm(self.handle)
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

    def after_call(self, eager: set[int], limits: list[str]) -> None:
        self.eager |= eager
        self.counts["recompile_limits_hit"] += len(limits)

    def new_epoch(self) -> None:
        """Forget captured graphs."""
        if self.backend is not None:
            self.counts["past_graphs"] += len(self.backend.graphs)
        self.backend, self._callables, self._blocks, self._packable = None, {}, {}, None
        self.regions, self._whole, self._by_block = {}, set(), set()
        epoch = str(next(_EPOCHS))
        for site in self.handle.sites:
            adapters = attach.adapters_of(site.module)
            if adapters is not None:
                adapters.epoch = epoch
        self._signatures.clear()
        self.eager.clear()


def preview(handle: Handle, inputs: Any) -> list[CapturedGraph]:
    """Capture and rewrite the graphs of ``inputs`` as a call would, op by op where kernels would be compiled."""
    options = handle.options.backend
    if options.name in JOINT_BACKENDS:
        options = dataclasses.replace(options, name="aot_eager", mode=None, options={})
    own, handle.captures = handle.captures, Captures(handle, options)
    try:
        with without_size_memory():
            warmup.run_once(handle.model, inputs)
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
    if not getattr(model, "_require_grads_hooks", None):
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            return
    model.disable_input_require_grads()  # type: ignore[operator]
