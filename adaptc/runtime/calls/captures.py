"""The captured forms of a model's entry points, one epoch at a time."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from adaptc.capture.backend import JOINT_BACKENDS, AdapterBackend, prepare
from adaptc.capture.call import CALL
from adaptc.capture.graphs import CapturedGraph
from adaptc.errors import NewSignatureWarning, RecompileLimitWarning, UnsupportedError
from adaptc.methods import quantised
from adaptc.runtime.adapters import AdapterRecord
from adaptc.runtime.batch import Batch, asked_for, checked_names, rows_of_call
from adaptc.runtime.calls import output_hooks, regions, warmup
from adaptc.runtime.calls.alike import Copies
from adaptc.runtime.calls.guards import unneeded
from adaptc.runtime.calls.layouts import Layouts
from adaptc.runtime.calls.lifts import lifts_of
from adaptc.runtime.calls.lint import Lint
from adaptc.runtime.calls.state import Calls, Epoch
from adaptc.runtime.calls.warmup import tensors_of
from adaptc.runtime.calls.watch import Watch
from adaptc.runtime.processes import DataParallelCheck
from adaptc.runtime.site_adapters import adapters_of
from adaptc.runtime.slots import ModelSlots
from adaptc.runtime.weights.pending import Pending
from adaptc.torch_internals import RecompileLimitWatch, compile_isolated, state_across_modules, without_size_memory

#: How often one frame may be compiled before Dynamo gives up on it (torch's default is 8).
RECOMPILE_LIMIT = 64
_EPOCHS = itertools.count()
#: How many epochs are kept beside the one that is used.
_KEPT = 8
#: How many batches are kept: a server forms few of them again and again.
_BATCHES = 16


def compiled(
    calls: Calls, run: Callable[..., Any], backend: Callable[..., Any], *, copies: int = 0
) -> Callable[..., Any]:
    """``run``, a function, captured as the options say; for so many ``copies`` of a block, which may turn out to need
    a graph or two of their own."""
    options, epoch = calls.options, calls.epoch

    def without(guards: list[tuple[str, str]]) -> list[bool]:
        return unneeded(guards, hooked=epoch.watch is None or epoch.watch.sites_are_hooked)

    return compile_isolated(
        run,
        backend=backend,
        recompile_limit=RECOMPILE_LIMIT + 2 * copies,
        unneeded=without,
        fullgraph=options.fullgraph,
        dynamic=options.dynamic,
    )


class Capture:
    """One capture epoch of one entry point: a fresh backend object and callable, which share no cache entries
    with any other model or epoch. Without a backend the entry point runs as it is, and blocks inside it are captured.
    """

    def __init__(self, calls: Captures, function: Callable[..., Any], backend: AdapterBackend | None) -> None:
        self.calls = calls
        self.across = calls.adapters.has_taps

        # A frame of ours as the root: Dynamo skips frames of torch's own containers, so that a model that is
        # an nn.Sequential or an nn.TransformerEncoder would capture nothing.
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        self.whole = backend is not None
        self.run = run if backend is None else compiled(calls, run, backend)

    def __call__(
        self, kind: tuple[object, ...], rows: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call of a kind (of which blocks may find that it is to be captured whole); ``rows``: whose they are, in a
        batch of several adapters."""
        records = torch.is_grad_enabled()
        eager: set[int] = set()
        recorded: set[int] = set()
        stopped: set[int] = set()
        now = vars(CALL)  # of this thread
        before = now.copy()
        now.update(eager=eager, depth=CALL.depth + 1, whole=self.whole)
        now.update(recorded=recorded if records else None, stopped=stopped if records else None)
        if rows is not None:
            now.update(rows=rows)
        slots = None if records else self.calls.slots
        now.update(slots=slots, in_slots="" if slots is None else slots.name)
        try:
            with RecompileLimitWatch() as limits, state_across_modules() if self.across else nullcontext():
                output = self.run(*args, **kwargs)
        finally:
            found = kind if CALL.whole and not self.whole else None
            now.clear()
            now.update(before)
            self.calls.after_call(found, eager, limits)
            for message in limits:
                warnings.warn(RecompileLimitWarning(message), stacklevel=3)
        if records:
            with_gradients = [t for t in tensors_of(output) if t.requires_grad]
            self.calls.pending.note(with_gradients)
            if rows is None:
                self.calls.lint.after_call(self.calls, with_gradients, recorded, stopped)
        return output


class Captures(Calls):
    """Captures the calls of a model.

    An epoch ends when the set of adapted modules changes. It also ends when hooks or methods of the user change, and is
    then kept, for when they are as they were.
    """

    def _start(self) -> None:
        super()._start()
        self.lint = Lint(self.adapters)
        self.pending = Pending()
        self._check_data_parallel = DataParallelCheck(self.adapters)
        #: Whether what a training step needs was begun with.
        self._prepared = False
        #: (path, module) of layers in 4-bit codes; None: not looked for yet.
        self._packable: list[tuple[str, nn.Module]] | None = None
        #: Epochs that ended because of hooks or methods, the last used one at the end.
        self._kept: list[Epoch] = []
        #: What a batch was made of -> the batch, and the records, whose ids are no others' while they are here: of the
        #: last ones, the last used one at the end.
        self._batches: dict[object, tuple[Batch, list[AdapterRecord]]] = {}
        #: Where the rows of a batch are in what adapted modules read.
        self.layouts = Layouts()
        self._slots: ModelSlots | None = None
        self._slots_are_known = False
        #: With a bank: what acted in the last call with gradients.
        self._announced: object = None
        #: Whether it was said that more of these were captured than are kept.
        self._told = False

    def call(self, entry: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = self.adapters.model
        if self.adapters.merged is not None and model.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "a call in training mode: the adapters are merged and would get no gradients",
                do="model.adaptc.unmerge() to train on, or model.eval()",
            )
        self._check_data_parallel()
        if model.__dict__.get("_require_grads_hooks"):
            drop_embedding_hooks(model)
        if self._packable != []:
            self._check_gradients()
        self._look_at_model()
        batch, rows = self.batching.current, None
        if batch is not None:
            batch.check()
            rows, first = rows_of_call(batch, args, kwargs)
            self.layouts.check(batch, entry, function, first, args, kwargs)
        if torch.is_grad_enabled():
            self.differentiated = None if batch is None or rows is None else (batch, rows)
        if self.adapters.bank is not None and torch.is_grad_enabled():
            acting = (self.adapters.live, batch, tuple(map(id, self.adapters.records.values())))
            if acting != self._announced:
                self._announced = acting
                self.announce(None if batch is None else batch.signature)
        epoch = self._open()
        self.counts["calls"] += 1
        if not epoch.regions:
            return self._capture(entry, function, whole=True)((), rows, args, kwargs)
        kind = (entry, *regions.kind_of_call(model, kwargs))
        whole = kind in epoch.whole or regions.wants_whole(model, epoch.stacks, args, kwargs)
        return self._capture(entry, function, whole=whole)(kind, rows, args, kwargs)

    @property
    def slots(self) -> ModelSlots | None:
        """What the slots of the model do; None without a bank."""
        if self.adapters.bank is None:
            return None
        if self._slots is None:
            self._slots, self._slots_are_known = ModelSlots(), False
        if not self._slots_are_known:
            self._slots.look(site.module for site in self.adapters.sites)
            self._slots_are_known = True
        return self._slots

    def _capture(self, entry: str, function: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
        """``function`` captured whole, or as it is, its blocks captured."""
        self.last_was_whole = whole
        key = (entry, whole)
        found = self.epoch.entries.get(key)
        if found is None:
            found = self.epoch.entries[key] = Capture(self, function, self.epoch.backend if whole else None)
        return found

    def block(self, name: str) -> Callable[..., Any]:
        found = self.epoch.blocks.get(name)
        if found is None:
            epoch = self._open()
            assert epoch.backend is not None
            blocks, kinds = regions.copies(self.adapters.model, epoch.regions, name)
            capture: Callable[..., Any] = epoch.backend
            if self.options.regional == "auto":
                # The first block's input may need no gradient.
                capture = Copies(self, capture, blocks, kinds + 1)
            found = epoch.blocks[name] = compiled(self, regions.run_block, capture, copies=len(blocks))
        return found

    def _open(self) -> Epoch:
        """This epoch, which begins with its first call."""
        epoch, model = self.epoch, self.adapters.model
        if epoch.backend is None:
            output_hooks.install(model)
            if self.adapters.bank is None:
                self.note_signature()
            self.adapters.check_weights()
            epoch.lifts = lifts_of(self.adapters)
            epoch.backend = AdapterBackend(self.adapters.pipeline(), self.options.backend, self.adapter_tensors)
            epoch.regions = regions.arm(self)
            epoch.stacks = regions.caching_stacks(model, epoch.regions)
            epoch.follow(Watch(model))
            self.counts["epochs"] += 1
        if not self._prepared and torch.is_grad_enabled():
            self._prepared = True
            prepare(self.options.backend, model.parameters())
        return epoch

    def _check_gradients(self) -> None:
        """Raise where a step would be computed without the gradients that flow through the base."""
        model = self.adapters.model
        if self._packable is None:
            self._packable = [(path, m) for path, m in model.named_modules() if quantised.may_lose_gradients(m)]
        if not (self._packable and model.training and torch.is_grad_enabled()):
            return
        reasons = ((path, quantised.loses_gradients(module)) for path, module in self._packable)
        path, refusal = next((pair for pair in reasons if pair[1] is not None), ("", None))
        if refusal is not None:
            raise UnsupportedError(f"{path}: {refusal.reason}: no gradient flows through", do=refusal.do)

    def note_signature(self, signature: tuple[object, ...] | None = None) -> bool:
        """Remember the live adapters' signature, or one of a batch; True when graphs were captured and none fits it."""
        signature = self.adapters.signature() if signature is None else signature
        if signature in self.epoch.signatures:
            return False
        self.epoch.signatures.add(signature)
        self.counts["signatures"] += 1
        return self.epoch.backend is not None

    def batch(self, names: Sequence[str | None], spans: torch.Tensor | None) -> Batch:
        """The batch of ``names``, and ``spans``, checked: one that there was, where nothing has changed."""
        self._look_at_model()
        names, key = checked_names(self.adapters, names), None
        if spans is None and not any(self.adapters.record(name).rows for name in names if name is not None):
            key = (names, tuple(map(id, self.adapters.records.values())), self.epoch.watch)
        known = self._batches.pop(key, None)
        if known is None:
            batch = asked_for(self.adapters, self.order, names, spans)
            batch.check()
            known = batch, [*self.adapters.records.values()]
        if key is not None:
            self._batches[key] = known
            if len(self._batches) > _BATCHES:
                del self._batches[next(iter(self._batches))]
        return known[0]

    def _look_at_model(self) -> None:
        """Go on in another epoch where hooks, methods or modules changed."""
        if self.epoch.watch is not None and self.epoch.watch.sees_a_change():
            self._follow()

    def announce(self, signature: tuple[object, ...] | None = None, what: str = "", *, level: int = 5) -> None:
        """Say that a call compiles, where what is live (or ``what``, of that signature) has not been compiled for.
        ``level``: that of the user's line above this."""
        live, outdated = self.adapters.live, False
        if signature is None and live and self._lifts_changed():
            outdated = True
            self.new_epoch()
        if self.note_signature(signature) or outdated:
            named = what or ", ".join(map(repr, live)) or "no adapter"
            message = f"{named}: kinds, shapes or dtypes not seen before; the next call compiles once"
            if self.adapters.bank is not None:
                message += " (a bank is for calls without gradients)"
            warnings.warn(NewSignatureWarning(message), stacklevel=level)

    def _lifts_changed(self) -> bool:
        """Whether graphs were captured, and the live adapters ask for other regions to record gradients than those did
        that were live then."""
        return self.epoch.backend is not None and lifts_of(self.adapters) != self.epoch.lifts

    def after_call(self, found: tuple[object, ...] | None, eager: set[int], limits: list[str]) -> None:
        """Count a call. ``found``: its kind, if it was found to need capturing whole and ran op by op from there."""
        if found is None:
            self.epoch.eager |= eager
        else:
            self.epoch.whole.add(found)
            self.epoch.once |= eager
        self.counts["recompile_limits_hit"] += len(limits)

    def run_ahead(self, inputs: Any) -> None:
        """Capture what a call with ``inputs`` needs, by one that leaves no trace."""
        model, known = self.adapters.model, len(self.epoch.whole)

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.call("", model._call_impl, args, kwargs)

        warmup.run_once(model, run, inputs)
        if len(self.epoch.whole) > known:
            warmup.run_once(model, run, inputs)

    def preview(self) -> list[CapturedGraph]:
        """The graphs that a call with the example inputs would run, op by op where kernels would be compiled."""
        inputs = self.options.example_inputs
        if inputs is None:
            return []
        backend = self.options.backend
        if backend.name in JOINT_BACKENDS:
            backend = dataclasses.replace(backend, name="aot_eager", mode=None, options={})
        own = Captures(self.adapters, dataclasses.replace(self.options, backend=backend))
        own.lint = self.lint
        try:
            with without_size_memory():
                own.run_ahead(inputs)
            return own.graphs
        finally:
            regions.disarm(self.adapters.model)
            if self.epoch.regions:
                self.epoch.regions = regions.arm(self)

    def new_epoch(self) -> None:
        """Forget captured graphs."""
        self.counts["past_graphs"] += sum(len(epoch.graphs) for epoch in (*self._kept, self.epoch))
        self._kept.clear()
        self._packable = None
        self.layouts = Layouts()
        self._slots_are_known, self._announced = False, None
        self._begin(Epoch(str(next(_EPOCHS))))

    def _begin(self, epoch: Epoch) -> None:
        """Go on in ``epoch``, and tell the sites its name."""
        self.epoch = epoch
        for site in self.adapters.sites:
            adapters = adapters_of(site.module)
            if adapters is not None:
                adapters.epoch = epoch.name

    def _follow(self) -> None:
        """Go on with what was captured with the hooks and the methods that the model has now, or begin an epoch."""
        self._slots_are_known = False
        now, ended = Watch(self.adapters.model), self.epoch
        self.layouts = Layouts()
        if not ended.fits(now):
            ended.name = next((a.epoch for s in self.adapters.sites if (a := adapters_of(s.module))), "")
            self._kept.append(ended)
            found = next((kept for kept in self._kept if kept.fits(now)), None)
            self._begin(found or Epoch(str(next(_EPOCHS))))
            if found is None:
                self._drop_old()
                return
            self._kept.remove(found)
        self.epoch.follow(now)
        if self.epoch.regions:
            self.epoch.regions = regions.arm(self)

    def _drop_old(self) -> None:
        """Keep the last epochs only; say so once where there have been many."""
        if len(self._kept) <= _KEPT:
            return
        self.counts["past_graphs"] += len(self._kept.pop(0).graphs)
        if not self._told:
            self._told = True
            message = (
                f"hooks or methods of the model's classes changed for the {_KEPT + 1}th time, and it was captured anew"
                " each time (set them once, or set and remove the same functions)"
            )
            warnings.warn(RecompileLimitWarning(message), stacklevel=6)


def drop_embedding_hooks(model: nn.Module) -> None:
    """Remove the hook that transformers puts on frozen embeddings for checkpointing.

    ``activation_checkpointing_enable`` makes the embeddings' output require a gradient, which breaks the graph;
    only re-entrant checkpointing needs it.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            return
    model.disable_input_require_grads()  # type: ignore[operator]
