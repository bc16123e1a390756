"""Merging: adapters folded into the base's weights, with what undoes it.

The values are computed from the base's own weights in fp64 and rounded once, in the order of the adapters' names: the
result depends on which adapters are merged, and on nothing else. While they are, no adapter is live: they act once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

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
class _Target:
    """A tensor that is written."""

    paths: tuple[str, ...]
    tensor: torch.Tensor


def merge(adapters: AdapterSet, names: Sequence[str], how: keep.Keep, find: Find) -> MergeReport:
    """Fold the adapters ``names`` into the base; they act alone then. Merged already: nothing happens.

    Args:
        how: where the base's own weights are kept.
        find: its files, for ``how=None``.

    Raises:
        AdapterNameError, SiteError, UnsupportedError: nothing has changed then.
        MergeError: it failed half-way, and was undone.
    """
    adapters.check_together(tuple(names))
    merged = adapters.merged
    if merged is not None and set(merged.names) == set(names):
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
        targets = _targets(adapters, names, folds)
        keep.check_room([target.tensor for target in targets.values()], how)
        patch = _kept(targets, how, find) if how is None else None
    before = adapters.live if merged is None else merged.before
    adapters.set_live(())
    try:
        patch = patch or _kept(targets, how, find)
    except BaseException:
        adapters.set_live(before)
        raise
    adapters.merged = Merged(names, before, patch)
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


def _report_of(merged: Merged) -> MergeReport:
    report: MergeReport = merged.report
    return report


def _targets(
    adapters: AdapterSet, names: Sequence[str], folds: Sequence[folding.Fold]
) -> dict[object, _Target]:
    """What is written, by the memory where it is: tensors of the sites, and rows that came with the adapters."""
    model = adapters.model
    wanted = [fold.path(name) for fold in folds for name in fold.replaced]
    wanted += [rows.path for name in names for rows in adapters.records[name].rows]
    places = {folding.place(t) for path in wanted if (t := tensor_at(model, path)) is not None}
    ours = tuple(f"{path}.adapters.".lstrip(".") for site in adapters.sites for path in site.paths)
    found: dict[object, _Target] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for path, tensor in everything:
        where = folding.place(tensor)
        if where in places and not path.startswith(ours):
            known = found.get(where)
            found[where] = _Target((*(known.paths if known else ()), path), known.tensor if known else tensor)
    return found


def _kept(targets: Mapping[object, _Target], how: keep.Keep, find: Find) -> Patch:
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
    slot_at = {path: slot for slot in patch.slots for path in slot.paths}
    written: set[int] = set()
    rows: list[TensorError] = []

    def write(path: str, module: nn.Module, exact: torch.Tensor) -> None:
        slot = slot_at[path]
        target = tensor_at(model, path)
        if id(slot) in written or target is None:
            return
        written.add(id(slot))
        value = folding.rounded(exact, slot.kept).to(target.device)
        patch.write(model, slot, value)
        if exact.is_floating_point():
            rows.append(error_of(path, module, exact.to(value.device), value))

    def base(path: str) -> torch.Tensor:
        """The base's own values in fp64, with the rows that came with the adapters."""
        target = tensor_at(model, path)
        kept = slot_at[path].kept
        wide = folding.widened(kept if target is None else kept.to(target.device))
        for name in merged.names:
            for part in adapters.records[name].rows:
                if part.path in slot_at[path].paths:
                    wide.index_copy_(0, part.index.to(wide.device), part.held.to(kept.dtype).to(wide))
        return wide

    for fold in folds:
        paths = {name: fold.path(name) for name in fold.replaced if fold.path(name) in slot_at}
        if all(id(slot_at[path]) in written for path in paths.values()):
            continue
        for name, exact in fold.exact({name: base(path) for name, path in paths.items()}).items():
            if name in paths:
                write(paths[name], _owner(fold.site.module, name), exact)
    for name in merged.names:
        for part in adapters.records[name].rows:
            write(part.path, model.get_submodule(part.path.rpartition(".")[0]), base(part.path))
    return rows


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
