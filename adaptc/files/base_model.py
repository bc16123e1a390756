"""A base's model without its weights in memory: where it needs one, that is mapped from the base's files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.errors import CheckpointError, MissingKeyError, TensorShapeError, UnsupportedError
from adaptc.files.base_folder import BaseFolder
from adaptc.files.base_names import Group, names_in
from adaptc.files.mapped import MappedFile
from adaptc.runtime import embeddings


class BaseModel:
    """The model that a folder's config names, on the meta device but for what :meth:`fill` and :meth:`make` give it.

    Args:
        scratch: a directory for what is neither in a file of the base nor in memory.

    Raises:
        UnsupportedError: the model is none of transformers' own.
    """

    def __init__(self, folder: BaseFolder, scratch: Path) -> None:
        self.folder = folder
        self.model: Any = _empty(folder)
        #: Path of an embedding -> how many rows the base's files have of it, where the model has more.
        self.grown: dict[str, int] = {}
        #: Paths of weights that are written to in place, for which the model gets copies on the disk.
        self.copied: set[str] = set()
        #: Path in the model -> names in the files.
        self.plain: dict[str, list[str]] = {}
        #: Path in the model -> what it is made of.
        self.groups: dict[str, Group] = {}
        self._made_shapes: dict[str, tuple[int, ...]] = {}
        self._file_of = {name: file for file, name in folder.tensors()}
        self._files = {file: MappedFile.read(folder.path / file, rows) for file, rows in folder.files.items()}
        self._scratch, self._numbers = scratch, itertools.count()
        self._scratched: list[MappedFile] = []

    def stored(self, name: str) -> torch.Tensor:
        """The tensor of this name as its file has it, mapped."""
        return self._files[self._file_of[name]].tensor(name)

    def let_go(self) -> None:
        """Take what was looked at out of memory."""
        for file in (*self._files.values(), *self._scratched):
            file.let_go()

    def close(self) -> None:
        for file in (*self._files.values(), *self._scratched):
            file.close()

    # -- weights ---------------------------------------------------------------------------------------

    def resize(self, rows: int) -> dict[str, Any]:
        """Give the vocabulary ``rows`` entries, before the weights are there; returns what changes in the config."""
        before = self.model.config.to_dict()
        sizes = {path: len(tensor) for path, tensor in embeddings.parameters(self.model).items()}
        with torch.device("meta"):
            self.model.resize_token_embeddings(rows, mean_resizing=False)
        now = embeddings.parameters(self.model)
        self.grown = {path: size for path, size in sizes.items() if path in now and len(now[path]) != size}
        return _changes(before, self.model.config.to_dict())

    def fill(self) -> None:
        """Give the model the weights that its files have as it has them.

        Raises:
            TensorShapeError: a weight does not fit the config.
        """
        found = names_in(self.model, self._file_of)
        self.plain = found.plain
        state: Mapping[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        on_disk = [path for path in self.plain if path in self.copied | self.grown.keys()]
        copies = self._new({path: (self.stored(self.plain[path][0]).dtype, state[path].shape) for path in on_disk})
        for path, names in self.plain.items():
            tensor = self.stored(names[0])
            shape = torch.Size([self.grown[path], *state[path].shape[1:]]) if path in self.grown else state[path].shape
            if tensor.shape != shape:
                raise TensorShapeError(
                    f"{self.folder.path}: {names[0]} does not fit config.json", expected=tuple(shape),
                    found=tuple(tensor.shape),
                )  # fmt: skip
            if path in copies:
                copies[path][: len(tensor)] = tensor
                tensor = copies[path]
            self._put(path, tensor)
        for group in found.groups.values():
            for path, tensor in group.made({n: self.stored(n).to("meta") for n, _ in group.sources}).items():
                self.groups[path] = group
                self._made_shapes[path] = tuple(tensor.shape)
        missing = set(state) - self.plain.keys() - self.groups.keys()
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        self.let_go()

    def make(self, modules: Iterable[str]) -> None:
        """Make the weights of the ``modules`` (paths) that the files have in other pieces, on the disk.

        Raises:
            CheckpointError: transformers cannot make them.
        """
        within = set(modules)
        wanted = {p: group for p, group in self.groups.items() if p.rpartition(".")[0] in within}
        made = self._new({p: (self._dtype_of(p, group), self._made_shapes[p]) for p, group in wanted.items()})
        state = self.model.state_dict()
        for group in {id(group): group for group in wanted.values()}.values():
            for path, tensor in group.made({name: self.stored(name) for name, _ in group.sources}).items():
                if path not in made:
                    continue
                if path not in state or state[path].shape != tensor.shape:
                    raise TensorShapeError(
                        f"{self.folder.path}: what is made of {group.sources[0][0]} does not fit config.json",
                        expected=tuple(state[path].shape) if path in state else f"no {path}", found=tuple(tensor.shape),
                    )  # fmt: skip
                made[path].copy_(tensor)
                self._put(path, made[path])
            self.let_go()

    def check_values(self, modules: Iterable[str]) -> None:
        """Raise MissingKeyError where a module (by its path) has a weight that no file has."""
        for path in modules:
            for name, parameter in self.model.get_submodule(path).named_parameters(recurse=False):
                if parameter.is_meta:
                    raise MissingKeyError(
                        f"{self.folder.path} has no {path}.{name}, which the adapter acts on",
                        expected=f"the weights of a {type(self.model).__name__}, as config.json says",
                        do="load the base with transformers, in the class that the adapter was trained with, and"
                        " write it with save_pretrained() first",
                    )

    def _dtype_of(self, path: str, group: Group) -> torch.dtype:
        dtypes = {self.stored(name).dtype for name, _ in group.sources}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self.folder.path}: the tensors of {path} have several dtypes", found=", ".join(map(str, dtypes)),
                do="load the base with transformers and write it with save_pretrained() first",
            )  # fmt: skip
        return dtypes.pop()

    def _new(self, rows: Mapping[str, tuple[torch.dtype, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of zeros on the disk."""
        if not rows:
            return {}
        file = MappedFile.scratch(self._scratch / f"scratch-{next(self._numbers)}", rows)
        self._scratched.append(file)
        return {path: file.tensor(path) for path in rows}

    def _put(self, path: str, tensor: torch.Tensor) -> None:
        owner, _, name = path.rpartition(".")
        module: nn.Module = self.model.get_submodule(owner)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor


def _empty(folder: BaseFolder) -> nn.Module:
    import transformers

    named = folder.config.get("architectures") or []
    kind = getattr(transformers, str(named[0]), None) if named else None
    if kind is None:
        raise UnsupportedError(
            f"{folder.path}: what class its model is of is not known", found=", ".join(map(str, named)) or "none",
            expected="a class of transformers in config.json, under architectures",
            do="load the base, adaptc.compile(model, adapter), and model.save_pretrained(directory, merge=True)",
        )  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: nn.Module = kind(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UnsupportedError(
            f"{folder.path}: transformers makes no {named[0]} by its config.json", found=error
        ) from error
    return model.eval()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``now`` that differ from ``before``; of entries that are mappings, theirs."""
    found: dict[str, Any] = {}
    for key, value in now.items():
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            if inner := _changes(before[key], value):
                found[key] = inner
        elif value != before.get(key):
            found[key] = value
    return found


__all__ = ["BaseModel"]
