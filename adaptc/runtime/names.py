"""The names that adapters may have, and the directories that go by them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from adaptc.errors import AdapterNameError, UnsafePathError

#: Names that are part of PEFT's keys. PEFT drops from a file every key with another adapter's name in it.
_PEFT_WORDS = {
    "adapters", "base_layer", "base_model", "bias", "lora", "model", "modules_to_save", "original_module",
    "token_adapter", "weight", "__base__",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")


def check_adapter_name(name: str, paths: Iterable[str] = ()) -> None:
    """Raise when ``name`` cannot be an adapter's name, in adaptc, in PEFT or in a file system.

    Args:
        paths: module paths of the host. PEFT takes adapter names off its keys by name, so one that equals a
            component of a path loses tensors when the file holds several adapters.

    Raises:
        UnsafePathError: the name would leave its directory.
        AdapterNameError: the name is not a word, or is already in use for something else.
    """
    if not isinstance(name, str):
        raise AdapterNameError("an adapter's name is text", found=repr(name))
    if name in (".", "..") or re.search(r"[/\\\x00]", name):
        raise UnsafePathError(
            f"adapter name {name!r} would leave its directory", expected="a plain word such as sft-v2"
        )
    if not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"{name!r} is not a legal adapter name",
            expected="a letter or underscore, then letters, digits, underscores and hyphens (100 at most)",
        )
    used_by = None
    if name in _PEFT_WORDS or name.startswith("lora_"):
        used_by = "PEFT's keys"
    elif hasattr(nn.ModuleDict(), name):
        used_by = "torch.nn.ModuleDict"
    elif any(name in path.split(".") for path in paths):
        used_by = "a module of the model"
    if used_by is not None:
        raise AdapterNameError(
            f"{name!r} cannot be an adapter's name: {used_by} has that name", do="choose another name"
        )


def adapter_directory(root: str | os.PathLike[str], name: str) -> Path:
    """Where the adapter ``name`` lies under ``root``, by PEFT's rule: "default" at the root, others below.

    Raises:
        UnsafePathError: the place lies outside of ``root`` (by its name, or through a link).
        AdapterNameError: not a legal name.
    """
    check_adapter_name(name)
    directory = Path(root) if name == "default" else Path(root) / name
    if not directory.resolve().is_relative_to(Path(root).resolve()):
        raise UnsafePathError(
            f"{directory} leads out of {root}", found=directory.resolve(), do="give the real directory"
        )
    return directory
