"""Merging: adapters folded into the base's weights, with what undoes it.

The values are computed from the base's own weights in fp64 and rounded once, in the order of the adapters' names: the
result depends on which adapters are merged, and on nothing else. While they are, no adapter is live: they act once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from adaptc.errors import MergeError
from adaptc.runtime import folding
from adaptc.runtime.weights import keep
from adaptc.runtime.weights.patch import Merged, Patch, Slot, tensor_at
from adaptc.runtime.weights.report import MergeReport, TensorError, error_of, errors

if TYPE_CHECKING:
    from adaptc.runtime.adapters import AdapterSet

#: Path of a tensor in the model -> the tensor in the base's own files, or None.
Find = Callable[[str], "keep.Stored | None"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A tensor that is written."""

    paths: tuple[str, ...]
    tensor: torch.Tensor


def merge(adapters: AdapterSet, names: Sequence[str], how: keep.Keep, find: Find) -> MergeReport:
    """Fold the adapters ``names`` into the base; they act alone then. Merged already, with the values that they have
    now: nothing happens.

    Args:
        how: where the base's own weights are kept.
        find: its files, for ``how=None``.

    Raises:
        AdapterNameError, SiteError, UnsupportedError: nothing has changed then.
        MergeError: it failed half-way, and was undone.
    """
    adapters.check_together(tuple(names))
    merged = adapters.merged
    if merged is not None and set(merged.names) == set(names) and merged.values == _values(adapters, names):
        return _report_of(merged)
    return _merge(adapters, folding.canonical(adapters, names), how, find)


def merge_for_good(adapters: AdapterSet) -> None:
    """Leave the live adapters in the base's weights, as they act, or those that are merged; none is live then.

    Raises:
        UnsupportedError, MergeError: as :func:`merge`.
    """
    if adapters.merged is None:
        _merge(adapters, folding.as_live(adapters), "memory", lambda _: None)
    adapters.keep_merged()


def _merge(adapters: AdapterSet, names: tuple[str, ...], how: keep.Keep, find: Find) -> MergeReport:
    """Fold the adapters in this order, which may act together."""
    merged = adapters.merged
    with adapters.base_alone():
        folds = folding.folds(adapters, names)
        targets = written_tensors(adapters, names, folds)
        keep.check_room([target.tensor for target in targets.values()], how)
        patch = _kept(targets, how, find) if how is None else None
    before = adapters.live if merged is None else merged.before
    adapters.set_live(())
    try:
        patch = patch or _kept(targets, how, find)
    except BaseException:
        adapters.set_live(before)
        raise
    adapters.merged = Merged(names, before, patch, _values(adapters, names))
    try:
        rows = _write(adapters, folds, patch)
        patch.guard(adapters.model)
    except BaseException as error:
        adapters.unmerge()
        if isinstance(error, Exception):
            raise MergeError(
                f"merging {', '.join(names)} failed half-way, and everything was put back: the base has its own"
                " weights, bit for bit",
                found=f"{type(error).__name__}: {error}",
            ) from error
        raise
    adapters.say_active()
    report = adapters.merged.report = MergeReport(names, errors(rows), patch.bytes_kept)
    return report


def _values(adapters: AdapterSet, names: Sequence[str]) -> dict[int, int]:
    """Of each tensor of these adapters how often it was written, as torch counts."""
    parts = [a for site in adapters.sites for name in names for a in site.of(name)]
    return {id(t): t._version for a in parts for t in (*a.parameters(), *a.buffers())}


def _report_of(merged: Merged) -> MergeReport:
    report: MergeReport = merged.report
    return report


def written_tensors(
    adapters: AdapterSet, names: Sequence[str], folds: Sequence[folding.Fold]
) -> dict[object, Target]:
    """What is written, by the memory where it is: tensors of the sites, and rows that came with the adapters."""
    model = adapters.model
    wanted = [fold.path(name) for fold in folds for name in fold.replaced]
    wanted += [rows.path for name in names for rows in adapters.records[name].rows]
    places = {folding.place(t) for path in wanted if (t := tensor_at(model, path)) is not None}
    ours = tuple(f"{path}.adapters.".lstrip(".") for site in adapters.sites for path in site.paths)
    found: dict[object, Target] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for path, tensor in everything:
        where = folding.place(tensor)
        if where in places and not path.startswith(ours):
            known = found.get(where)
            found[where] = Target((*(known.paths if known else ()), path), known.tensor if known else tensor)
    return found


def _kept(targets: Mapping[object, Target], how: keep.Keep, find: Find) -> Patch:
    """A patch that writes nothing yet, with the base's own bytes."""
    tensors = [target.tensor for target in targets.values()]
    stamps: list[keep.Stamp] = []
    if how is None:
        kept, stamps = keep.in_files([(target.paths, target.tensor) for target in targets.values()], find)
    else:
        kept = keep.in_memory(tensors) if how == "memory" else keep.on_disk(tensors)
    slots = [Slot(target.paths, copy) for target, copy in zip(targets.values(), kept, strict=True)]
    return Patch(slots, how, stamps)


def _write(adapters: AdapterSet, folds: Sequence[folding.Fold], patch: Patch) -> list[TensorError]:
    """Write the exact values, rounded, tensor by tensor; returns how far off they are."""
    model, merged = adapters.model, adapters.merged
    assert merged is not None
    rows: list[TensorError] = []
    for value in exact_values(adapters, merged.names, folds, patch.slots):
        target = tensor_at(model, value.path)
        assert target is not None  # exact_values gives what is there
        written = folding.rounded(value.exact, value.slot.kept).to(target.device)
        patch.write(model, value.slot, written)
        if value.exact.is_floating_point():
            rows.append(error_of(value.path, value.module, value.exact.to(written.device), written))
    return rows


class Exact(NamedTuple):
    """What a tensor of the base becomes, before it is rounded.

    Attributes:
        path, module: of the tensor, and of the module that owns it.
    """

    slot: Slot
    path: str
    module: nn.Module
    exact: torch.Tensor


def exact_values(
    adapters: AdapterSet, names: Sequence[str], folds: Sequence[folding.Fold], slots: Sequence[Slot]
) -> Iterator[Exact]:
    """The value of every slot with the adapters ``names`` in it, once; those of one site are made at a time."""
    slot_at = {path: slot for slot in slots for path in slot.paths}
    done: set[int] = set()
    model = adapters.model

    def is_wanted(path: str) -> bool:
        return id(slot_at[path]) not in done and tensor_at(model, path) is not None

    def base(path: str) -> torch.Tensor:
        """The base's own values in fp64, with the rows that came with the adapters."""
        target = tensor_at(model, path)
        kept = slot_at[path].kept
        wide = folding.widened(kept if target is None else kept.to(target.device))
        for name in names:
            for part in adapters.records[name].rows:
                if part.path in slot_at[path].paths:
                    wide.index_copy_(0, part.index.to(wide.device), part.held.to(kept.dtype).to(wide))
        return wide

    def of_site(fold: folding.Fold) -> Iterator[Exact]:
        paths = {name: fold.path(name) for name in fold.replaced if fold.path(name) in slot_at}
        if not any(is_wanted(path) for path in paths.values()):
            return
        for name, exact in fold.exact({name: base(path) for name, path in paths.items()}).items():
            if name in paths and is_wanted(paths[name]):
                done.add(id(slot_at[paths[name]]))
                yield Exact(slot_at[paths[name]], paths[name], _owner(fold.site.module, name), exact)

    for fold in folds:
        yield from of_site(fold)  # whose tensors are gone before the next one's are made
    for name in names:
        for part in adapters.records[name].rows:
            if is_wanted(part.path):
                done.add(id(slot_at[part.path]))
                yield Exact(slot_at[part.path], part.path, _owner(model, part.path), base(part.path))


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
