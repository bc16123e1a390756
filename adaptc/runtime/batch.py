"""A batch whose rows, or tokens of its rows, use different adapters: what is asked for, checked, and put in place.

Each thread has its own: what a call needs is in ``CALL``, what acts at a site in ``SiteAdapters.rows``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.errors import BatchError
from adaptc.methods.base import Adapter
from adaptc.runtime.adapters import AdapterSet
from adaptc.runtime.site_adapters import RowAdapters, adapters_of
from adaptc.torch_internals import tree_leaves

_NUMBERS = itertools.count(1)
_APART = "call the model for it apart, or leave it out of the batch"


class Batch:
    """Which adapter each row has.

    Attributes:
        names: the adapters that have rows, each once, in an order in which those of equal signatures stand together.
        ids: int64 (B,), or (B, S) of spans: number of the row's adapter in ``names``; ``len(names)`` for the base.
    """

    def __init__(self, adapters: AdapterSet, names: Sequence[str], ids: torch.Tensor) -> None:
        self.adapters, self.names, self.ids = adapters, tuple(names), ids
        #: Another for every batch: a checkpointed block is computed again with that of its forward.
        self.number = next(_NUMBERS)
        self.sites = [(site, tuple(tuple(site.of(name)) for name in names)) for site in adapters.sites]
        self._acting = [
            (found, RowAdapters.of(groups, site.adapters.values()))
            for site, groups in self.sites
            if (found := adapters_of(site.module)) is not None
        ]
        self._placed: dict[tuple[torch.device, int], torch.Tensor] = {}
        #: Whether the model was in training mode when it was checked.
        self._training: bool | None = None

    @property
    def spans(self) -> bool:
        return self.ids.dim() == 2

    @property
    def has_base(self) -> bool:
        return bool((self.ids == len(self.names)).any())

    @functools.cached_property
    def signature(self) -> tuple[object, ...]:
        """What captured graphs depend on."""
        groups = (groups for _, groups in self.sites)
        return ("batch", self.spans, *(tuple(tuple(a.signature() for a in g) for g in site) for site in groups))

    def rows(self, device: torch.device, copies: int) -> torch.Tensor:
        """``ids`` on a device, each row ``copies`` times in a row."""
        key = (device, copies)
        if key not in self._placed:
            self._placed[key] = self.ids.repeat_interleave(copies, 0).to(device)
        return self._placed[key]

    def check(self) -> None:
        """Raise BatchError for an adapter that cannot act on rows apart in this mode of the model, naming its site."""
        if self._training == self.adapters.model.training:
            return
        for name in self.names:
            if self.adapters.record(name).rows:
                raise BatchError(
                    f"batch: {name!r} came with embeddings of its own, which are in the base's weight while it acts",
                    do=_APART,
                )
            self.adapters.check_together((name,))
        for site, groups in self.sites:
            for name, group in zip(self.names, groups, strict=True):
                for adapter in group:
                    refusal = adapter.rows_refusal(site.module, spans=self.spans)
                    if refusal is not None:
                        raise BatchError(
                            f"batch: {name!r} ({adapter.method.kind}) at {site.path or 'the model'}: {refusal.reason}",
                            found=refusal.found, do=refusal.do or _APART,
                        )  # fmt: skip
            inside = [a for group in groups for a in group if a.acts_inside]
            kinds: list[type[Adapter]] = [type(adapter) for adapter in inside]
            for kind in dict.fromkeys(kinds):
                kind.check_rows_together(site.path or "the model", [*groups, *([()] if self.has_base else [])])
        self._training = self.adapters.model.training

    @contextlib.contextmanager
    def in_place(self, rows: torch.Tensor | None = None) -> Iterator[None]:
        """A block in which the model's sites act by these rows (``rows``: ids of a call's), on this thread."""
        before = CALL.rows, CALL.assignment, [found.rows.now() for found, _ in self._acting]
        try:
            for found, acting in self._acting:
                found.rows.put(acting)
            CALL.rows, CALL.assignment = self.ids if rows is None else rows, self.number
            yield
        finally:
            CALL.rows, CALL.assignment = before[:2]
            for (found, _), earlier in zip(self._acting, before[2], strict=True):
                found.rows.put(earlier)


class Batching(threading.local):
    """The batches that a model is in, one state per thread."""

    def __init__(self) -> None:
        self.current: Batch | None = None

    def __reduce__(self) -> tuple[type[Batching], tuple[()]]:
        return Batching, ()  # copies of a model are in no batch

    def set(self, batch: Batch | None) -> None:
        self.current = batch

    def refuse(self, what: str) -> None:
        """Raise BatchError for an action that a batch is not to see half-way."""
        if self.current is not None:
            raise BatchError(
                f"{what} inside of model.adaptc.batch(...)",
                found=f"a batch of {', '.join(map(repr, self.current.names)) or 'the base alone'}",
                do="do it before the block, or after it",
            )


#: On this thread: the models that are in a batch, outermost first.
class _Open(threading.local):
    def __init__(self) -> None:
        self.models: list[nn.Module] = []


_OPEN = _Open()


@contextlib.contextmanager
def opened(batching: Batching, batch: Batch) -> Iterator[None]:
    """A block in which the calls of the model, on this thread, are those of ``batch``; afterwards all is as before.

    Raises:
        BatchError: a model that it is part of, or has as a part, is in a batch.
    """
    model = batch.adapters.model
    for other in _OPEN.models:
        if any(part is other for part in model.modules()) or any(part is model for part in other.modules()):
            raise BatchError(
                f"batch: a {type(other).__name__} is in a batch, and a {type(model).__name__} is part of it or has it"
                " as a part", do="one batch at a time",
            )  # fmt: skip
    _OPEN.models.append(model)
    batching.set(batch)
    try:
        with batch.adapters.base_alone(), batch.in_place():
            yield
    finally:
        batching.set(None)
        _OPEN.models.remove(model)


def checked_names(adapters: AdapterSet, names: Any) -> tuple[str | None, ...]:
    """``names``, of adapters that there are, or None.

    Raises:
        AdapterNameError: an unknown name. BatchError: no names, or something else.
    """
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or len(names) == 0 or not all(isinstance(name, str | None) for name in names):
        raise BatchError(
            "batch: which adapters?", expected='a name or None for every row, such as ["a", None, "b"]',
            found=repr(names)[:100],
        )  # fmt: skip
    for name in names:
        if name is not None:
            adapters.record(name)
    return tuple(names)


def asked_for(
    adapters: AdapterSet, order: dict[object, int], names: Sequence[str | None], spans: torch.Tensor | None
) -> Batch:
    """The batch that ``model.adaptc.batch(names, spans)`` means.

    ``order``: signature of an adapter -> its place among them; those that are new are added.

    Raises:
        BatchError: ids that are of none of the names.
    """
    if spans is None:
        used: Sequence[str | None] = names
        index = torch.arange(len(names))
    else:
        index = _checked(spans, len(names))
        used = [names[i] for i in sorted({*index.flatten().tolist()})]
    sites = adapters.sites
    records = list(adapters.records)
    signatures = {
        name: tuple(tuple(a.signature() for a in site.of(name)) for site in sites)
        for name in sorted({n for n in used if n is not None}, key=records.index)
    }
    for signature in signatures.values():
        order.setdefault(signature, len(order))
    present = sorted(signatures, key=lambda name: order[signatures[name]])  # stable
    numbers = torch.tensor([len(present) if n not in present else present.index(n) for n in names])
    return Batch(adapters, present, numbers[index])


def _checked(spans: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of spans, on the CPU as int64."""
    whole = isinstance(spans, torch.Tensor) and not (spans.is_floating_point() or spans.is_complex())
    if not whole or spans.dtype == torch.bool or spans.dim() != 2 or spans.numel() == 0:
        found = f"{tuple(spans.shape)} {spans.dtype}" if isinstance(spans, torch.Tensor) else type(spans).__name__
        raise BatchError(
            "batch: spans are not legal",
            expected="whole numbers (B, S): for each token the place of its name in names", found=found,
        )  # fmt: skip
    index = spans.detach().to("cpu", torch.int64)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        raise BatchError(
            "batch: spans have ids of no name", expected=f"0 to {count - 1}; the base is a None among the names",
            found=f"{low} to {high}",
        )  # fmt: skip
    return index


def rows_of_call(
    batch: Batch, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids of the rows of a call, the input that they are read off): of the first of its inputs that has a dimension.

    In ``generate`` each row may stand for several in a row: beams, or sequences that are drawn for it.

    Raises:
        BatchError: it has another number of rows, or tokens.
    """
    model, size = batch.adapters.model, batch.ids.shape[0]
    first = first_batched(model, args, kwargs)
    if first is None:
        raise BatchError("batch: a call without a tensor whose dim 0 could be the rows")
    n = first.shape[0]
    copies = n // size if n % size == 0 else 0
    if copies == 0 or (copies > 1 and not _is_generating(model)):
        raise BatchError(
            f"batch: {size} rows have adapters, and the call has {n}", expected=f"({size}, ...)",
            found=f"{tuple(first.shape)}, the first input of a {type(model).__name__}", do="name one adapter a row",
        )  # fmt: skip
    if batch.spans and tuple(first.shape[:2]) != tuple(batch.ids.shape):
        raise BatchError(
            "batch: spans of other sizes than the call's", expected=tuple(batch.ids.shape), found=tuple(first.shape),
            do="give an id for each token; tokens that are generated have none, so that spans go with single calls",
        )  # fmt: skip
    return batch.rows(first.device, copies), first


def first_batched(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor with a dimension among the arguments of a call, in the order of the forward's signature."""
    places = _places(type(model).forward)
    named = sorted(kwargs, key=lambda name: places.get(name, len(places)))
    values = tree_leaves([list(args), [kwargs[name] for name in named]])
    return next((value for value in values if isinstance(value, torch.Tensor) and value.dim() > 0), None)


@functools.lru_cache
def _places(forward: Callable[..., Any]) -> dict[str, int]:
    return {name: i for i, name in enumerate(inspect.signature(forward).parameters)}


def _is_generating(model: nn.Module) -> bool:
    """Whether this is a call of the model that its ``generate`` makes."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False
