"""Adapters that can never learn: what is said about them, and when.

* Both factors of a product are zero: each one's gradient is a multiple of the other. Said when values are set.
* The site is not called, or the loss does not depend on its output. Said after the first backward.
* The site runs under ``torch.no_grad`` in the model's forward, and nowhere else. That stays, and is said after the call
  with what would lift it (``passes.lift_no_grad``). Of a class for which it is lifted unasked, that is said once.

Everything is a warning of its own class and a row of ``explain()``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adaptc import distributed
from adaptc.errors import LiftedRegionWarning, NoGradientWarning
from adaptc.ir.fold import fold
from adaptc.passes.lift_no_grad import lifted
from adaptc.runtime.calls.lifts import cover
from adaptc.torch_internals import queue_after_backward

if TYPE_CHECKING:
    from adaptc.capture.graphs import CapturedGraph
    from adaptc.methods.base import Adapter
    from adaptc.runtime.adapters import AdapterSet, Site
    from adaptc.runtime.calls.state import Calls

_ZERO = "both factors are zero, so each one's gradient is zero too"
_STOPPED = "runs under torch.no_grad in the model's forward, which stays, so that nothing is trained there"
_OUTSIDE = "runs under torch.no_grad that does not begin in its captured graph, so that nothing is trained there"
_UNCALLED = "was not called in any forward"
_UNREACHED = "the loss does not depend on its output"
#: Backwards without any gradient, as when every advantage of a batch is zero, before that is taken for the rule.
_PATIENCE = 3


class Lint:
    """What is known of a model's adapters that cannot learn."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters
        #: (what, path): said already.
        self._told: set[tuple[str, str]] = set()
        #: Adapters that are live and the number of the capture epoch, where the first backward was looked at.
        self._watched: set[tuple[int, tuple[str, ...]]] = set()
        #: How many backwards in a row gave no adapter a gradient.
        self._fruitless = 0
        #: The graphs whose lifted regions were told.
        self._looked_at: tuple[int, ...] = ()
        #: The site-id tensors that ran without gradients in the last call where one did, and the graphs then.
        self._stopped_ids: tuple[set[int], tuple[int, ...]] = (set(), ())
        #: Site path -> why it runs without gradients.
        self.stopped: dict[str, str] = {}
        #: Site path -> why the first backward gave it no gradient.
        self.silent: dict[str, str] = {}
        #: Adapter name -> its parameters that cannot learn from the values they had when they were set.
        self.dead: dict[str, list[str]] = {}

    def check_values(self, name: str) -> None:
        """Warn of trained parameters of the adapter ``name`` whose gradient is zero for good, at these values.

        Where parameters are sharded all processes must call.
        """
        self.dead[name] = [
            f"{site.path}.{parameter}"
            for site in self.adapters.sites
            for adapter in site.of(name)
            for parameter in dead_parameters(adapter)
        ]
        self._warn_once(NoGradientWarning, _ZERO, self.dead[name], "load or draw other values")

    def after_call(
        self, calls: Calls, outputs: Sequence[torch.Tensor], recorded: set[int], stopped: set[int]
    ) -> None:
        """Look at a call that was made with gradients on: which sites ran, by ``id`` of their site-id tensors.

        ``outputs``: those that have a gradient.
        """
        seen = tuple(map(id, calls.graphs))
        if self._looked_at != seen:
            self._looked_at = seen
            self._tell_lifted(calls)
        if (alone := stopped - recorded) and self._stopped_ids != (alone, seen):
            self._stopped_ids = alone, seen
            self._tell_stopped(calls, alone)
        key = (calls.counts["epochs"], self.adapters.live)
        if key not in self._watched:
            self._watch(calls, key, outputs)

    def _tell_lifted(self, calls: Calls) -> None:
        """Name the sites whose region was lifted unasked."""
        lifts, found = calls.epoch.lifts, lifted_in(calls.graphs)
        own = {path: why for path, why in lifts.own.items() if path in found and not lifts.is_asked(path)}
        for why in dict.fromkeys(own.values()):
            what = "a torch.no_grad region records gradients, so that adapters inside it train"
            do = f"{why}; leave these modules out of the plan to keep it as it was"
            self._warn_once(LiftedRegionWarning, what, sorted(p for p in own if own[p] == why), do)

    def _tell_stopped(self, calls: Calls, site_ids: set[int]) -> None:
        """Name trained sites that ran without gradients alone."""
        paths = calls.site_paths()
        trained = {site.path for site, _ in self._trained()}
        found = {paths[i] for i in site_ids if i in paths} & trained
        in_graphs = {path for graph in calls.graphs for path in graph.stopped}
        # By block, and op by op around blocks, a region does not begin in a graph; captured whole it may.
        whole, lifts = calls.last_was_whole, calls.epoch.lifts
        outside = {p for p in found if (whole and p not in in_graphs) or lifts.is_asked(p)}
        self.stopped.update((path, _OUTSIDE if path in outside else _STOPPED) for path in found)
        do = "call this part of the model with gradients on, or leave it out of the plan"
        self._warn_once(NoGradientWarning, _OUTSIDE, sorted(outside), do)
        names = json.dumps(self._to_lift(found - outside))
        do = f"to train it, lift_no_grad={names} in adaptc.compile, or passes: {{lift_no_grad: {names}}} in the plan"
        self._warn_once(NoGradientWarning, _STOPPED, sorted(found - outside), do)

    def _to_lift(self, paths: Iterable[str]) -> list[str]:
        others = {site.path for site in self.adapters.sites} - set(self.stopped)
        return cover(sorted(paths), others)

    def _watch(self, calls: Calls, key: tuple[int, tuple[str, ...]], outputs: Sequence[torch.Tensor]) -> None:
        """Look at the parameters when the first backward through ``outputs`` has ended."""
        hooks: list[Any] = []

        def started(_: torch.Tensor) -> None:
            for hook in hooks:
                hook.remove()
            hooks.clear()
            if key not in self._watched:
                # Twice: FSDP queues the end of its own work, which gives sharded parameters their gradients.
                queue_after_backward(lambda: queue_after_backward(lambda: self._after_backward(calls, key)))

        hooks += [output.register_hook(started) for output in outputs]  # type: ignore[no-untyped-call]

    def _after_backward(self, calls: Calls, key: tuple[int, tuple[str, ...]]) -> None:
        if not any(_has_gradient(p) for _, adapter in self._trained() for p in adapter.parameters()):
            # torch.autograd.grad, which leaves nothing to look at, or a loss that is zero.
            self._fruitless += 1
            if self._fruitless < _PATIENCE or not any(p.grad is not None for p in self.adapters.model.parameters()):
                return
        self._fruitless = 0
        self._watched.add(key)
        idle, silent = set(calls.idle_sites()), {}
        for path, _ in self._without_gradient():
            silent[path] = self.stopped.get(path) or (_UNCALLED if path in idle else _UNREACHED)
        self.silent.update(silent)
        for reason in dict.fromkeys(silent.values()):
            if reason not in (_STOPPED, _OUTSIDE):
                found = [path for path, why in silent.items() if why == reason]
                if reason == _UNCALLED:
                    # Experts and dropped layers: an equal module beside it ran, so others will in other batches.
                    ran = {_numberless(site.path) for site in self.adapters.sites if site.path not in idle}
                    found = [path for path in found if _numberless(path) not in ran]
                do = "leave it out of the plan, unless other batches or losses use it"
                self._warn_once(NoGradientWarning, f"no gradient in the first backward: {reason}", found, do)

    def _trained(self) -> Iterator[tuple[Site, Adapter]]:
        """Sites and their live adapters that are trained."""
        for site in self.adapters.sites:
            for adapter in (a for name in self.adapters.live for a in site.of(name)):
                if any(p.requires_grad for p in adapter.parameters()):
                    yield site, adapter

    def _without_gradient(self) -> Iterator[tuple[str, Adapter]]:
        """(site path, adapter) of live adapters that are trained and have no gradient."""
        for site, adapter in self._trained():
            if not any(_has_gradient(p) for p in adapter.parameters() if p.requires_grad):
                yield site.path, adapter

    def rows(self, calls: Calls) -> Iterator[str]:
        """Lines for ``explain()``."""
        still = {path for path, _ in self._without_gradient()}
        done = lifted_in(calls.graphs)
        for path in fold(sorted(done)):
            yield f"inside a torch.no_grad region, which records gradients for it: {path}"
        if any(graph.training for graph in calls.graphs):
            for path in calls.epoch.lifts.asked:
                if not any(path in (inner, "") or inner.startswith(f"{path}.") for inner in done):
                    yield f"lift_no_grad names it, and no captured region without gradients runs it: {path or '.'}"
        for reason in (_STOPPED, _OUTSIDE):
            stopped = sorted(path for path, why in self.stopped.items() if why == reason and path in still)
            cure = f" (lift_no_grad: {json.dumps(self._to_lift(stopped))})" if stopped and reason == _STOPPED else ""
            yield from (f"{reason}: {path}{cure}" for path in fold(stopped))
        silent = {path: reason for path, reason in self.silent.items() if path in still and path not in self.stopped}
        for reason in dict.fromkeys(silent.values()):
            found = [path for path, why in silent.items() if why == reason]
            yield from (f"no gradient in the first backward ({reason}): {path}" for path in fold(found))
        for name in self.adapters.live:
            yield from (f"cannot learn ({_ZERO}): {path}" for path in fold(self.dead.get(name, [])))

    def _warn_once(self, kind: type[UserWarning], what: str, paths: Sequence[str], do: str) -> None:
        new = [path for path in paths if (what, path) not in self._told]
        if not new:
            return
        self._told.update((what, path) for path in new)
        more = f" and {len(new) - 4} more" if len(new) > 4 else ""
        warnings.warn(kind(f"{what}: {', '.join(new[:4])}{more} ({do})"), stacklevel=5)


def lifted_in(graphs: Sequence[CapturedGraph]) -> set[str]:
    """The sites whose region without gradients was lifted in one of the graphs."""
    return lifted([report for graph in graphs for report in graph.capture_reports])


def dead_parameters(adapter: Adapter) -> Iterator[str]:
    """Trained parameters of products whose other factors are zero and stay so.

    A factor stays zero when it is frozen, or when the gradient that could change it is zero as well.
    """
    for group in adapter.products():
        factors = {name: p for name in group if (p := _parameter(adapter, name)) is not None}
        if len(factors) < 2 or any(p.is_meta for p in factors.values()):
            continue
        zero = {name: _is_zero(p) for name, p in factors.items()}
        for name, parameter in factors.items():
            others = [other for other in factors if other != name]
            stuck = zero[name] or not any(factors[other].requires_grad for other in others)
            if parameter.requires_grad and stuck and all(zero[other] for other in others):
                yield name


def _numberless(path: str) -> str:
    """The path of a module, whatever its number among its like."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _has_gradient(parameter: torch.Tensor) -> bool:
    """Whether a gradient is there and not zero: what a captured graph's other outputs depend on gets a zero."""
    gradient = parameter.grad
    if gradient is None or distributed.is_distributed(gradient):
        return gradient is not None
    return bool(gradient.any())


def _parameter(adapter: Adapter, name: str) -> torch.nn.Parameter | None:
    owner, _, last = name.rpartition(".")
    return adapter.get_submodule(owner)._parameters.get(last)


def _is_zero(parameter: torch.Tensor) -> bool:
    return not bool(distributed.whole(parameter.detach()).any())
