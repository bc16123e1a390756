"""Which weights the files of a base hold, by name; the weights are not read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

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
        spellings = {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")}
        for new, old in _OLD.items():
            spellings |= {s.removesuffix(new) + old for s in spellings if s.endswith(new)}
        if not spellings & known:
            return f"{where} has no {name}"
    return None


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


__all__ = ["missing_in_base"]
