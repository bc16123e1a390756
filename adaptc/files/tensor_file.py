"""Reading one safetensors file, with every way it can be malformed told apart.

The header is checked here first, because the library reports most faults alike; the tensors are then read
by the library, from the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from adaptc.errors import (
    FileHeaderError,
    HeaderLengthError,
    NonFiniteError,
    TensorLayoutError,
    TruncatedFileError,
    UnknownDtypeError,
    UnsafePathError,
)

#: safetensors' own limit; a longer header is an attack or a wrong length.
MAX_HEADER = 100_000_000
LENGTH_BYTES = 8
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
DOWNLOAD_AGAIN = "copy or download the file again; it cannot be repaired"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_UNSAFE = re.compile(r"[/\\\x00-\x1f]")


def read_tensor_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        TruncatedFileError, HeaderLengthError, FileHeaderError, TensorLayoutError, UnknownDtypeError: the
            file is malformed.
        UnsafePathError: a tensor's name contains a path separator.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    with path.open("rb") as file:
        metadata = check_header(file, path)
        file.seek(0)
        data = file.read()
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:  # a rule of the library that is not checked here
        raise FileHeaderError(
            f"{path} is not a legal safetensors file", found=error, do=DOWNLOAD_AGAIN
        ) from error
    for name in sorted(tensors):
        check_finite(name, tensors[name], where=str(path))
    return dict(sorted(tensors.items())), metadata


def tensor_rows(path: Path) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Name -> dtype, shape and offset in bytes of every tensor of a safetensors file; the tensors are not read.

    Raises:
        CheckpointError: the file is malformed.
    """
    with path.open("rb") as file:
        check_header(file, path)
        file.seek(0)
        header, length = _read_header(file, path, os.fstat(file.fileno()).st_size)
    header.pop("__metadata__", None)
    begin = LENGTH_BYTES + length
    return {
        name: (DTYPES[entry["dtype"]], entry["shape"], begin + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def check_finite(name: str, tensor: torch.Tensor, *, where: str, do: str | None = None) -> None:
    """Raise NonFiniteError when ``tensor`` holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    # 8-bit floats have no isfinite; float32 holds each of their values.
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(
            f"tensor {name} in {where} holds NaN or infinity",
            expected="finite numbers",
            found=f"{bad} of {tensor.numel()} values are not finite",
            do=do or "take an earlier checkpoint: the run that wrote this one had diverged",
        )


def check_header(file: BinaryIO, path: Path) -> dict[str, str]:
    """Check the header of an open safetensors file against the file's size; returns its metadata."""
    size = os.fstat(file.fileno()).st_size
    header, length = _read_header(file, path, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileHeaderError(f"{path}: __metadata__ is not a map from text to text", found=metadata)
    spans = sorted(_span(name, entry, path) for name, entry in header.items())
    _check_layout(spans, path, available=size - LENGTH_BYTES - length)
    return metadata


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise TruncatedFileError(
            f"{path} ends inside the length of its header",
            expected=f"at least {LENGTH_BYTES} bytes", found=f"{size} bytes", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise HeaderLengthError(
            f"{path} declares an impossible header length",
            expected=f"at most {MAX_HEADER} bytes", found=f"{length} bytes",
            do="this is not a safetensors file, or its first 8 bytes are damaged; " + DOWNLOAD_AGAIN,
        )  # fmt: skip
    raw = file.read(length)
    if len(raw) == length:
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            _check_declared_length(raw + file.read(MAX_HEADER), length, path, size)
            raise FileHeaderError(
                f"{path}: the header is not JSON", found=f"{error} in {raw[:60]!r}", do=DOWNLOAD_AGAIN
            ) from error
        if isinstance(header, dict):
            return header, length
        raise FileHeaderError(
            f"{path}: the header is not a JSON object", found=f"{raw[:60]!r}", do=DOWNLOAD_AGAIN
        )
    _check_declared_length(raw, length, path, size)
    raise TruncatedFileError(
        f"{path} ends inside its header",
        expected=f"at least {LENGTH_BYTES + length} bytes", found=f"{size} bytes", do=DOWNLOAD_AGAIN,
    )  # fmt: skip


def _check_declared_length(data: bytes, length: int, path: Path, size: int) -> None:
    """Raise HeaderLengthError when a JSON object starts ``data`` and does not end where it should."""
    end = _end_of_json(data)
    if end is None:
        return
    padding = length - end  # headers are padded with spaces to a multiple of 8
    if padding < 0 or data[end:length].strip() or (len(data) < length and padding >= LENGTH_BYTES):
        raise HeaderLengthError(
            f"{path} declares a wrong header length",
            expected=f"{end} bytes, where the header's JSON ends",
            found=f"{length} bytes in a file of {size} bytes", do=DOWNLOAD_AGAIN,
        )  # fmt: skip


def _end_of_json(raw: bytes) -> int | None:
    """Where the JSON object at the start of ``raw`` ends, whatever follows it; None when it does not end."""
    text = raw.decode("latin-1")  # one character per byte, so that positions are byte positions
    try:
        return json.JSONDecoder().raw_decode(text)[1] if text.startswith("{") else None
    except (ValueError, RecursionError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"name {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def _span(name: str, entry: object, path: Path) -> tuple[int, int, str]:
    """(begin, end, name) of a tensor's bytes, after checking its header entry by itself."""
    if _UNSAFE.search(name):
        raise UnsafePathError(
            f"{path}: tensor name {name!r} contains a path separator or control character",
            expected="a dotted module path", do="do not trust this file",
        )  # fmt: skip
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileHeaderError(
            f"{path}: the header entry of tensor {name} is malformed",
            expected="dtype, shape and data_offsets", found=repr(entry)[:200], do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnknownDtypeError(
            f"{path}: tensor {name} has a dtype that adaptc does not read",
            expected=", ".join(ITEM_BYTES), found=repr(dtype), do="convert the file to a dtype of this list",
        )  # fmt: skip
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise FileHeaderError(
            f"{path}: shape or data_offsets of tensor {name} are not lists of sizes",
            found=f"shape {shape!r}, data_offsets {offsets!r}", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    begin, end = offsets
    expected = ITEM_BYTES[dtype]
    for extent in shape:
        expected *= extent
    if end - begin != expected:
        raise TensorLayoutError(
            f"{path}: tensor {name} has a wrong number of bytes",
            expected=f"{expected} bytes for {dtype} {shape}", found=f"{end - begin} bytes", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    return begin, end, name


def _sizes(value: object) -> bool:
    """True for a list of natural numbers (``bool`` is an ``int`` in Python, not in JSON)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(spans: list[tuple[int, int, str]], path: Path, *, available: int) -> None:
    """The tensors' bytes must fill the rest of the file, one after the other."""
    position, previous = 0, "the header"
    for begin, end, name in spans:
        if begin != position:
            fault = "overlaps" if begin < position else "leaves a gap after"
            raise TensorLayoutError(
                f"{path}: tensor {name} {fault} {previous}",
                expected=f"bytes from {position}", found=f"bytes {begin} to {end}", do=DOWNLOAD_AGAIN,
            )  # fmt: skip
        position, previous = end, name
    if position > available:
        first = next(name for _, end, name in spans if end > available)
        raise TruncatedFileError(
            f"{path} ends inside tensor {first}",
            expected=f"{position} bytes of tensors", found=f"{available} bytes", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    if position < available:
        raise TensorLayoutError(
            f"{path} holds bytes that belong to no tensor",
            expected=f"{position} bytes of tensors", found=f"{available} bytes", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
