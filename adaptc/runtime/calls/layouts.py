"""Where the rows of a batch are in what adapted modules read and return: seen, not guessed.

A size alone does not tell: a model that goes by time first has as many steps in front as rows where the two are equal.
So before the first call of its kind the model runs on fake tensors (shapes, no values) with a number of rows that no
other size is. What then has that size in front has rows there. The ops that led there say whether they are in the order
of the batch (``row_order``), and where dim 0 is a multiple of their number (tokens of all rows in one dimension,
windows of images), whether the parts of row 0 come first.

Where a model does not run on fake tensors, rows are taken to be dim 0 of what has as many there, in calls in which no
other size of the inputs is that number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.errors import BatchError
from adaptc.methods.base import Adapter
from adaptc.runtime.batch import Batch
from adaptc.runtime.calls import row_order
from adaptc.runtime.site_adapters import SiteAdapters, adapters_of
from adaptc.torch_internals import fake_inputs, global_module_hooks, tree_leaves, tree_map, watch_calls
from adaptc.transformers_names import LAYER_CACHES, experts_by_shape, given_cache

#: Numbers of rows to choose from.
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039)
#: How many kinds of calls are remembered.
_MOST = 64
#: torch's stance is the process's: threads that look at once would put back each other's.
_STANCE = threading.RLock()


@dataclasses.dataclass(eq=False)
class Seen:
    """What one kind of call showed.

    ``wrong``: (adapters of a module, whether inside of it) -> why the rows of what they read or correct are not dim 0;
    ``flat``: those of modules with the parts of all rows in dim 0; ``failed``: why the model does not run on fakes, and
    whether that was found ``twice``.
    """

    wrong: dict[tuple[int, bool], str] = dataclasses.field(default_factory=dict)
    flat: set[int] = dataclasses.field(default_factory=set)
    failed: str | None = None
    twice: bool = False


class _Hooks:
    """What a call of a model runs beside the methods of its classes, which may move rows: hooks of its modules, and
    functions in the place of a module's ``forward``. Equal where they are the same objects."""

    def __init__(self, found: Iterable[Any]) -> None:
        self._found = list(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hooks) and self._ids() == other._ids()

    def __hash__(self) -> int:
        return hash(self._ids())

    def _ids(self) -> tuple[int, ...]:
        return tuple(map(id, self._found))


class Layouts:
    """What the kinds of calls of one model showed. Of a model with other modules another one is made."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], Seen] = {}
        self._held: list[dict[str, Any]] | None = None
        self._last: dict[str, Seen] = {}
        #: The number of the batch, and what of its calls was seen, of the last check.
        self._checked: tuple[int, Seen] | None = None

    def check(
        self, batch: Batch, entry: str, run: Callable[..., Any], first: torch.Tensor, args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Raise BatchError, naming the site, where an adapter of the batch acts on what does not have rows in front."""
        model = batch.adapters.model
        key = (entry, model.training, _shape_of_call(args, kwargs), self._hooks(model))
        seen = self._seen.get(key)
        if seen is None or (seen.failed is not None and not seen.twice):
            # A call that goes on from a filled cache needs it; its modules are those of the call that filled it.
            is_begun = _is_filled(given_cache(kwargs))
            seen = self._last.get(entry) if is_begun else None
            if seen is None:
                # What failed once may have met what was there once only: it is tried again.
                seen = dataclasses.replace(_look(batch, run, first, args, kwargs), twice=key in self._seen)
            if len(self._seen) > _MOST:
                self._seen.clear()
            self._seen[key] = seen
        self._last[entry] = seen
        if seen.failed is not None:
            _check_sizes(first, args, kwargs, seen.failed)
        if self._checked == (batch.number, seen):
            return
        self._checked = None
        for site, groups in batch.sites:
            found = adapters_of(site.module)
            if found is None:
                continue
            found.is_flat = id(found) in seen.flat
            uses = {a.acts_inside or a.replaces_forward for group in groups for a in group}
            reasons = [seen.wrong[id(found), use] for use in uses if (id(found), use) in seen.wrong]
            if reasons:
                raise BatchError(
                    f"batch: {site.path or 'the model'}: {reasons[0]}",
                    expected="the rows of the batch in dim 0, or all that is of row 0 there first, then of row 1",
                    do="leave this module out of the adapters' plans, or call the model for each adapter apart",
                )  # fmt: skip
        self._checked = batch.number, seen

    def _hooks(self, model: nn.Module) -> _Hooks:
        if self._held is None:
            self._held = [module.__dict__ for module in model.modules() if not isinstance(module, Adapter)]
        found = [hook for hooks in global_module_hooks().values() for hook in hooks.values()]
        for held in self._held:
            found += held.get("_forward_pre_hooks", {}).values()
            found += held.get("_forward_hooks", {}).values()
            if "forward" in held:
                found.append(held["forward"])
        return _Hooks(found)


def _shape_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[object, ...]:
    def one(value: Any) -> object:
        if isinstance(value, torch.Tensor):
            return value.dim(), value.is_floating_point()
        return value if isinstance(value, bool | str | int | None) else type(value)

    return tuple(map(one, args)), frozenset((name, one(value)) for name, value in kwargs.items() if value is not None)


def _is_filled(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    if cache is None or length is None:
        return cache is not None
    try:
        return int(length()) > 0
    except ValueError:  # none of its layers has a length: they keep states
        return any(getattr(cache, "has_previous_state", lambda _: True)(i) for i in range(len(cache)))


def _check_sizes(first: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], failed: str) -> None:
    n = first.shape[0]
    sizes = [s for t in tree_leaves([args, dict(kwargs)]) if isinstance(t, torch.Tensor) for s in t.shape[1:]]
    if n in sizes or n == 1:
        raise BatchError(
            f"batch: which dimension of the model's tensors the {n} rows are cannot be told", found=failed,
            expected="a model that runs on fake tensors, or a number of rows that no other size of the inputs is",
            do="call it with another number of rows",
        )  # fmt: skip


def _look(
    batch: Batch, run: Callable[..., Any], first: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Seen:
    """Run the base on fake tensors."""
    model, seen, n = batch.adapters.model, Seen(), first.shape[0]
    named = {name: value for name, value in kwargs.items() if name not in LAYER_CACHES}
    sized = (*tree_leaves([list(args), named]), *model.parameters())
    sizes = {s for t in sized if isinstance(t, torch.Tensor) for s in t.shape}
    rows = next(p for p in _PRIMES if not any(size % p == 0 for size in sizes if size))

    def with_rows(keep: bool) -> Callable[[Any], Any]:
        def change(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != n:
                return value
            if value.dim() == 1 and keep and value is not first:
                return value
            return value.new_empty((rows, *value.shape[1:]))

        return change

    def record(found: SiteAdapters, inside: bool, values: Sequence[Any]) -> None:
        for value in values:
            value = value[0] if isinstance(value, tuple) and value else value
            if not isinstance(value, torch.Tensor):
                continue
            if row_order.is_moved(value):
                seen.wrong[id(found), inside] = "its rows may be in another order than those of the batch"
                continue
            if value.dim() > 0 and value.shape[0] == rows:
                continue
            if value.dim() > 0 and value.shape[0] % rows == 0 and row_order.is_kept(value):
                seen.flat.add(id(found))
                continue
            shape = tuple("rows" if s == rows else f"rows x {s // rows}" if s % rows == 0 else s for s in value.shape)
            seen.wrong[id(found), inside] = f"a tensor of it is ({', '.join(map(str, shape))})"

    errors = []
    for keep in (False, True):  # a tensor of one dimension may be one number a row, or one a token
        seen.wrong.clear()
        seen.flat.clear()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_left_alone(model))
                stack.enter_context(experts_by_shape(model.modules()))
                stack.enter_context(_probing(record, torch.arange(rows)))
                stack.enter_context(fake_inputs())
                stack.enter_context(torch.no_grad())
                given, by_name = tree_map(with_rows(keep), (tuple(args), named))
                stack.enter_context(watch_calls(row_order.follow(rows)))
                run(*given, **by_name)
            return seen
        except Exception as error:  # whatever a model does that fake tensors cannot
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return Seen(failed=errors[0])


@contextlib.contextmanager
def _probing(record: Callable[[SiteAdapters, bool, Sequence[Any]], None], ids: torch.Tensor) -> Iterator[None]:
    """A block in which adapters tell what they are given, and do nothing; the model is one call."""
    now = vars(CALL)
    before = now.copy()
    now.update(probe=record, rows=ids, depth=CALL.depth + 1, whole=True, eager=None, recorded=None, stopped=None)
    try:
        with _STANCE, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        now.clear()
        now.update(before)


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """A block after which every module has the attributes, and every generator the state, that it had before."""
    held: list[dict[str, Any]] = [h for m in model.modules() for h in (m.__dict__, m._parameters, m._buffers)]
    kept = [dict(one) for one in held]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for now, before in zip(held, kept, strict=True):
            if not _are_same(now, before):
                now.clear()
                now.update(before)


def _are_same(held: Mapping[Any, Any], before: Mapping[str, Any]) -> bool:
    return held.keys() == before.keys() and all(held[name] is value for name, value in before.items())
