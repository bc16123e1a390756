"""Merging files: an adapter's folder into a base's, without the model in memory.

The weights are those of ``from_pretrained``, ``compile``, ``merge()`` and ``save_pretrained(merge=True)``, bit for bit,
because the same code folds the adapter in. The model is built on the meta device, its weights are mapped from the
files, and what is folded is written before the next site is looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import AdaptcWarning, CheckpointError, CheckpointNotFoundError, MissingKeyError, UnsupportedError
from adaptc.files import folder, peft_keys
from adaptc.files.base_folder import BaseFolder
from adaptc.files.base_model import BaseModel
from adaptc.files.checkpoint import weights_in
from adaptc.files.merged_folder import MergedWeights, staged, write_rest
from adaptc.files.tensor_file import tensor_rows
from adaptc.methods import affine
from adaptc.runtime import embeddings, folding, merging
from adaptc.runtime.adapters import AdapterSet
from adaptc.runtime.fresh import with_all_biases
from adaptc.runtime.weights.patch import Slot
from adaptc.runtime.weights.report import TensorError, error_of, errors, lines_of

_NAME = "default"
#: What the files of a base may be written in.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """What ``merge_checkpoint`` wrote.

    Attributes:
        path: the new folder.
        tensors: a row for each tensor of the adapted layers that was written, with how far it is from the exact one.
        left_out: files of the base that hold its weights in another format, and were not copied.
    """

    path: Path
    tensors: tuple[TensorError, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: {len(self.tensors)} tensors merged", *lines_of(self.tensors)])


def merge_checkpoint(
    base_dir: Any, adapter_dir: Any, out_dir: Any, *, dtype: torch.dtype | None = None
) -> MergedCheckpoint:
    """Write the base in ``base_dir`` with the adapter in ``adapter_dir`` folded into its weights to ``out_dir``.

    One layer's weight is in memory at a time (in fp64, a few times), beside the adapter. The new folder has the base's
    files: the shards with the same tensors, and everything that is no weight. It is there when all is written and
    synced, or not at all.

    Args:
        base_dir: the folder of a model of transformers: config.json with its class, and weights in safetensors.
        adapter_dir: the folder of an adapter, as PEFT or adaptc saves it.
        out_dir: a new or empty directory.
        dtype: of all floating-point weights in the new files; default: as each is in the base's. An adapted weight is
            rounded once, from fp64.

    Raises:
        CheckpointError: a folder is malformed, or the adapter does not fit the base; ``out_dir`` is not free.
        UnsupportedError: what ``model.adaptc.merge`` refuses; a base that is quantised or not of transformers.
        PlanError, SiteError: the adapter's sites are not there.
    """
    if dtype is not None and dtype not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise UnsupportedError("merge_checkpoint: weights cannot be written in this dtype", expected=known, found=dtype)
    base = BaseFolder.read(base_dir)
    if not folder.is_adapter_directory(adapter_dir):
        do = "give the directory that PEFT or adaptc saved to"
        raise CheckpointNotFoundError(f"no adapter directory {adapter_dir}", do=do)
    sources = [base.path, Path(adapter_dir)]
    with contextlib.ExitStack() as stack:
        for block in (torch.device("cpu"), torch.inference_mode(False), torch.no_grad()):  # whatever the caller's are
            stack.enter_context(block)
        staging = stack.enter_context(staged(out_dir, sources))
        host = stack.enter_context(contextlib.closing(BaseModel(base, staging)))
        changes = _embeddings(host, Path(adapter_dir))
        adapters = _adapters(host, adapter_dir)
        rows, left_out = _write(host, adapters, staging, dtype, changes)
    if left_out:
        message = f"{base.path}: not copied, because they hold the base's own weights: {', '.join(left_out)}"
        warnings.warn(AdaptcWarning(message), stacklevel=2)
    return MergedCheckpoint(Path(out_dir), errors(rows), left_out)


# ------------------------------------------------------------------------------------------ the adapter


class _Adapters(AdapterSet):
    """Adapters of a model whose weights are mapped."""

    def __init__(self, host: BaseModel) -> None:
        super().__init__(host.model, None)
        self.host = host

    def let_go(self) -> None:
        self.host.let_go()


def _embeddings(host: BaseModel, adapter: Path) -> dict[str, Any]:
    """Let the model have embeddings that those of the adapter's file can be put into. Of a larger vocabulary it has as
    many; returns what changes in the config by that."""
    own = embeddings.parameters(host.model)
    file = weights_in(adapter)
    if not own or file is None:
        return {}
    rows = {peft_keys.embedding_of(key): shape for key, (_, shape, _) in tensor_rows(file).items()}
    given = [(shape, own[path]) for path, shape in rows.items() if path in own]
    if given:
        host.copied = set(own)
    sizes = {shape[0] for shape, old in given if shape[1:] == list(old.shape[1:]) and shape[0] > len(old)}
    return host.resize(sizes.pop()) if len(sizes) == 1 else {}


def _adapters(host: BaseModel, directory: Any) -> AdapterSet:
    """The adapter on the model, with the values of its files and the base's."""
    model = host.model
    plan = folder.plan_of(directory, model)
    host.fill()
    modules = dict.fromkeys(a.module_path for a in with_all_biases(plan.resolve(model), model))
    host.make(modules)
    host.check_values(modules)
    adapters = _Adapters(host)
    read = folder.read_new(adapters, directory)
    if read.rows and not host.copied:  # they would have been put into weights that are let go of
        raise CheckpointError(f"{directory} holds embeddings under names that are not those of the model's")
    with torch.random.fork_rng(devices=[]):
        adapters.install(_NAME, read.plan, config=read.files.config)
    folder.put(adapters, _NAME, read)
    host.let_go()
    _check_grown(host, adapters, read.decoded)
    return adapters


def _check_grown(host: BaseModel, adapters: AdapterSet, decoded: peft_keys.Decoded) -> None:
    """Raise MissingKeyError where a larger vocabulary has rows that neither the base nor the adapter has values for."""
    model = host.model
    whole = set(decoded.get(peft_keys.EMBEDDINGS, {}))
    for site in adapters.sites:
        if any(adapter.replaces_forward for adapter in site.of(_NAME)):
            whole |= {f"{site.path}.{name}" for name, _ in site.module.named_parameters(recurse=False)}
    given = {folding.place(model.get_parameter(path)) for path in whole}
    for path in host.grown:
        if folding.place(parameter := model.get_parameter(path)) not in given:
            raise MissingKeyError(
                f"the adapter has a vocabulary of {len(parameter)}, and no values for the new rows of {path}",
                expected="the embeddings and the head in the adapter's file",
                found=f"{host.grown[path]} rows in the base",
                do="save the adapter with save_embedding_layers=True from the model that it was trained in",
            )  # fmt: skip


# ------------------------------------------------------------------------------------------ the weights


def _write(
    host: BaseModel, adapters: AdapterSet, staging: Path, dtype: torch.dtype | None, changes: Mapping[str, Any]
) -> tuple[list[TensorError], tuple[str, ...]]:
    """Write the new folder; returns how far off the merged tensors are, and which files were left out."""
    names = (_NAME,)
    folds = folding.folds(adapters, names)
    slots = [Slot(t.paths, t.tensor.detach()) for t in merging.written_tensors(adapters, names, folds).values()]
    plain = _plain_names(host, slots)
    shapes = {host.plain[p][0]: host.model.get_parameter(p).shape for p in host.grown if p in host.plain}
    weights = MergedWeights(host.folder, staging, dtype, shapes)
    try:
        weights.copy(plain)
        rows = [_write_one(host, weights, value, dtype) for value in _one_by_one(host, weights, adapters, folds, slots)]
        weights.close(sync=True)
    finally:
        weights.close(sync=False)
    if dtype is not None:
        changes = {**changes, **_dtypes(host.folder.config, str(dtype).removeprefix("torch."))}
    return rows, write_rest(host.folder, staging, weights, changes)


def _plain_names(host: BaseModel, slots: Sequence[Slot]) -> set[str]:
    """The names in the files of the tensors that are written whole.

    Raises:
        MissingKeyError: a tensor that no file has; CheckpointError: one that a file has twice.
    """
    found: set[str] = set()
    for slot in slots:
        for path in slot.paths:
            if len(names := host.plain.get(path, [])) > 1:
                raise CheckpointError(f"{host.folder.path} has two tensors for {path}", found=", ".join(names))
            found |= set(names)
        if not any(path in host.plain or path in host.groups for path in slot.paths):
            raise MissingKeyError(f"{host.folder.path} has no {slot.paths[0]}, which the adapter changes")
    return found


def _one_by_one(
    host: BaseModel, weights: MergedWeights, adapters: AdapterSet, folds: Sequence[folding.Fold], slots: Sequence[Slot]
) -> Iterator[merging.Exact]:
    """The exact value of every slot, each gone from memory before the next one is made."""
    missing = {id(slot): slot for slot in slots}
    for value in merging.exact_values(adapters, (_NAME,), folds, slots):
        del missing[id(value.slot)]
        yield value
        del value
        host.let_go()
        weights.let_go()
    if missing:
        left = next(iter(missing.values()))
        raise CheckpointError(f"{left.paths[0]} got no value of the adapter: nothing was written")


def _write_one(
    host: BaseModel, weights: MergedWeights, value: merging.Exact, dtype: torch.dtype | None
) -> TensorError:
    slot = value.slot
    own = slot.kept.dtype
    rounded = affine.nearest(value.exact.detach(), dtype if dtype is not None and own.is_floating_point else own)
    for path in slot.paths:
        for name in host.plain.get(path, []):
            weights.tensor(name).copy_(rounded)
        if group := host.groups.get(path):
            group.unmake(path, rounded, {name: weights.tensor(name) for name, _ in group.sources})
    return error_of(value.path, value.module, value.exact, rounded)


def _dtypes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries of a config that name a dtype, and of the configs in it, as ``name``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            found[key] = name
        elif key.endswith("_config") and isinstance(value, Mapping) and (inner := _dtypes(value, name)):
            found[key] = inner
    return found


__all__ = ["MergedCheckpoint", "merge_checkpoint"]
