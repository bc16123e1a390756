"""The folder of a base of transformers: its config, and where each of its tensors lies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptc.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigSyntaxError,
    MissingKeyError,
    PickleRefusedError,
    UnexpectedKeyError,
    UnsafePathError,
    UnsupportedError,
)
from adaptc.files.mapped import Row
from adaptc.files.tensor_file import tensor_rows

CONFIG = "config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Formats of weights beside safetensors: what is in such files has no adapter in it.
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite",
    ".mlmodel", ".npz", ".npy", ".keras", ".bak",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BaseFolder:
    """Attributes:
    config: ``config.json``.
    index: ``model.safetensors.index.json``, or None where there is one file.
    files: name of a file -> the tensors in it.
    """

    path: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    files: dict[str, dict[str, Row]]

    @classmethod
    def read(cls, directory: Any) -> BaseFolder:
        """Reads headers, no tensors.

        Raises:
            CheckpointError: the folder is none of a base in safetensors, or malformed.
            UnsupportedError: the base is quantised.
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointNotFoundError(
                f"no directory {path}", found="a file" if path.exists() else "nothing",
                do=f"give the directory that holds {CONFIG}: huggingface_hub.snapshot_download(name) returns that of a"
                " model on the hub",
            )  # fmt: skip
        config = _json(path / CONFIG)
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path} holds an adapter, which transformers would put into the model by itself",
                expected="a base alone", do="move adapter_config.json and the adapter's weights out of it",
            )  # fmt: skip
        if config.get("quantization_config"):
            how = config["quantization_config"].get("quant_method", "some method")
            raise UnsupportedError(
                f"{path}: its weights are quantised", found=how,
                do="merge into the base without quantisation, and quantise the result",
            )  # fmt: skip
        if config.get("transformers_weights"):
            raise UnsupportedError(
                f"{path}: config.json names a file of weights of its own", found=config["transformers_weights"],
                do="load it with transformers and write it with save_pretrained()",
            )  # fmt: skip
        index, files = _weights(path)
        return cls(path, config, index, {name: dict(tensor_rows(path / name)) for name in files})._checked()

    def _checked(self) -> BaseFolder:
        owners: dict[str, str] = {}
        for file, name in self.tensors():
            if owners.setdefault(name, file) != file:
                raise UnexpectedKeyError(f"{self.path}: {name} is in {owners[name]} and in {file}")
        for name, file in (self.index or {"weight_map": {}})["weight_map"].items():
            if owners.get(name) != file:
                raise MissingKeyError(
                    f"{self.path}: {INDEX} says that {name} is in {file}",
                    found=f"it is in {owners[name]}" if name in owners else "no file has it",
                    do="copy or download the folder again",
                )  # fmt: skip
        return self

    def tensors(self) -> Iterator[tuple[str, str]]:
        """(file, name) of every tensor."""
        return ((file, name) for file, rows in self.files.items() for name in rows)

    def bytes(self) -> int:
        """What the weights take."""
        return sum((self.path / file).stat().st_size for file in self.files)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in file.parent.iterdir())[:8]) or "an empty directory"
        raise CheckpointNotFoundError(f"no {file.name} in {file.parent}", found=found)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigSyntaxError(f"{file} is not legal JSON", found=error) from error
    if not isinstance(content, dict):
        raise ConfigSyntaxError(f"{file} is not a JSON object", found=type(content).__name__)
    return content


def _weights(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, and the files of weights; transformers, too, prefers the one file."""
    if (path / WHOLE).is_file():
        return None, [WHOLE]
    if (path / INDEX).is_file():
        index = _json(path / INDEX)
        entries = index.get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
            raise ConfigSyntaxError(f"{path / INDEX} has no weight_map of names to files")
        files = sorted(set(entries.values()))
        for file in files:
            if Path(file).name != file or file in ("", ".", ".."):
                raise UnsafePathError(f"{path / INDEX} names a file outside its folder", found=repr(file))
            if not (path / file).is_file():
                raise CheckpointNotFoundError(f"no {file} in {path}", do="copy or download the folder again")
        return index, files
    others = sorted(p.name for p in path.iterdir() if p.suffix in OTHER_WEIGHTS or p.suffix == ".safetensors")
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in others):
        raise PickleRefusedError(
            f"{path} holds its weights as a pickle file, which can run any code when it is read",
            expected=f"{WHOLE} or {INDEX}", found=", ".join(others[:5]),
            do="if you trust it, load it with transformers and write it with save_pretrained()",
        )  # fmt: skip
    raise CheckpointNotFoundError(
        f"no {WHOLE} and no {INDEX} in {path}", found=", ".join(others[:5]) or "no weights",
        do="load it with transformers and write it with save_pretrained()",
    )  # fmt: skip


__all__ = ["CONFIG", "INDEX", "OTHER_WEIGHTS", "WHOLE", "BaseFolder"]
