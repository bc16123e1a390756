"""Which weights the files of a base hold, by name, and the weights themselves, mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from adaptc.files.tensor_file import tensor_rows
from adaptc.runtime.weights.keep import Stored, map_file

_WHOLE, _SHARDED = "model.safetensors", "model.safetensors.index.json"
#: Old names of a norm's tensors, which transformers still reads.
_OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def missing_in_base(where: str, names: Iterable[str], prefix: str) -> str | None:
    """Why the base at ``where`` (a folder, or a name on the hub that is cached) does not give the weights ``names``;
    None when it does. Heads that were drawn at random when the base was loaded are an example.

    Args:
        prefix: of the backbone's names in files of a model with a head.
    """
    known = _keys(where)
    if known is None:
        return f"{where} has no safetensors file here by which that could be told"
    for name in names:
        if not _spellings(name, prefix) & known:
            return f"{where} has no {name}"
    return None


def _spellings(name: str, prefix: str) -> set[str]:
    """What a weight may be called in files."""
    spellings = {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")} if prefix else {name}
    for new, old in _OLD.items():
        spellings |= {s.removesuffix(new) + old for s in spellings if s.endswith(new)}
    return spellings


class Finder:
    """The weights of a model as the safetensors files hold them that it was read from, by their paths in the model."""

    def __init__(self, model: nn.Module) -> None:
        self.where = str(getattr(model, "name_or_path", "") or "")
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")
        #: Name in the files -> its file; None: not looked up yet.
        self._files: dict[str, Path] | None = None
        self._tensors: dict[Path, dict[str, torch.Tensor]] = {}

    def __call__(self, path: str) -> Stored | None:
        """The weight at ``path``, mapped; None where no file has it."""
        if self._files is None:
            self._files = _files_of(self.where) if self.where else {}
        name = next((s for s in sorted(_spellings(path, self.prefix)) if s in self._files), None)
        if name is None:
            return None
        file = self._files[name]
        if file not in self._tensors:
            rows = tensor_rows(file)
            self._tensors[file] = dict(zip(rows, map_file(file, rows.values()), strict=True))
        tensor = self._tensors[file].get(name)
        return None if tensor is None else Stored(tensor, file)


def _files_of(where: str) -> dict[str, Path]:
    whole, sharded = _file(where, _WHOLE), _file(where, _SHARDED)
    if whole is not None:
        return dict.fromkeys(tensor_rows(whole), whole)
    if sharded is None:
        return {}
    found = {name: _file(where, file) for name, file in json.loads(sharded.read_text())["weight_map"].items()}
    return {name: file for name, file in found.items() if file is not None}


def _keys(where: str) -> set[str] | None:
    whole, sharded = _file(where, _WHOLE), _file(where, _SHARDED)
    if whole is not None:
        import safetensors

        with safetensors.safe_open(whole, "pt") as file:
            return set(file.keys())
    if sharded is not None:
        return set(json.loads(sharded.read_text())["weight_map"])
    return None


def _file(where: str, name: str) -> Path | None:
    if Path(where).is_dir():
        path = Path(where) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, name)
    return Path(found) if isinstance(found, str) else None


__all__ = ["Finder", "missing_in_base"]
