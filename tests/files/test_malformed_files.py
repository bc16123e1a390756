"""Malformed adapter files: each fault has its own error, at every tensor's position."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from adaptc import errors
from adaptc.files import checkpoint
from adaptc.files.tensor_file import read_tensor_file
from tests.files.adapter_files import NAMES, tensors, write


def raw_file(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="no adapter directory"):
        checkpoint.read_adapter(tmp_path / "none")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(errors.CheckpointNotFoundError, match=f"no {name} in"):
        checkpoint.read_adapter(tmp_path)


def test_adapters_below_the_directory_are_named(tmp_path: Path) -> None:
    write(tmp_path / "sft")
    with pytest.raises(errors.CheckpointNotFoundError) as error:
        checkpoint.read_adapter(tmp_path)
    assert "adapters in the sub-directories sft" in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt", "x.pkl"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / name)
    with pytest.raises(errors.PickleRefusedError, match="as a pickle file") as error:
        checkpoint.read_adapter(tmp_path)
    assert name in str(error.value) and "safe_serialization=True" in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = safetensors.torch.save(tensors(), metadata={"format": "pt"})
    file = tmp_path / "x.safetensors"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(errors.TruncatedFileError, match="ends inside"):
            read_tensor_file(file)


def test_a_cut_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors.torch.save({"a": torch.ones(4), "b": torch.ones(4)})[:-3])
    with pytest.raises(errors.TruncatedFileError, match="ends inside tensor b") as error:
        read_tensor_file(file)
    assert "32 bytes of tensors" in str(error.value) and "29 bytes" in str(error.value)


@pytest.mark.parametrize("delta", [-40, -8, -1, 1, 5, 100, 10**5, 10**12])
def test_a_wrong_header_length(tmp_path: Path, delta: int) -> None:
    # No padding follows this header, so each other length is wrong.
    data = raw_file({"a": {"dtype": "U8", "shape": [60], "data_offsets": [0, 60]}}, b"A" * 60)
    length = int.from_bytes(data[:8], "little")
    file = tmp_path / "x.safetensors"
    file.write_bytes((length + delta).to_bytes(8, "little") + data[8:])
    with pytest.raises(errors.HeaderLengthError, match="header length"):
        read_tensor_file(file)


def test_a_header_length_of_zero(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw_file({}, length=0))
    with pytest.raises(errors.HeaderLengthError, match="wrong header length"):
        read_tensor_file(file)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"not json at all", "the header is not JSON"),
        (b"\xff\xfe{}", "the header is not JSON"),
        (b"[" * 100_000, "the header is not JSON"),
        (b'{"a": 1, "a": 1}', "the header is not JSON"),
        (b"[1, 2]", "not a JSON object"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is not a map from text to text"),
        ({"__metadata__": []}, "__metadata__ is not a map from text to text"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "header entry of tensor a is malformed"),
        ({"a": 3}, "header entry of tensor a is malformed"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "tensor a are not lists of sizes"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "tensor a are not lists of sizes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "tensor a are not lists of sizes"),
        ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "tensor a are not lists of sizes"),
    ],
)
def test_a_malformed_header(tmp_path: Path, header: object, text: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw_file(header, b"\0" * 4))
    with pytest.raises(errors.FileHeaderError, match=text) as error:
        read_tensor_file(file)
    assert type(error.value) is errors.FileHeaderError


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["dtype", "short", "long", "overlap", "gap", "name"])
def test_a_malformed_tensor_entry_at_every_position(tmp_path: Path, name: str, fault: str) -> None:
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    header, body = split(file.read_bytes())
    entry = header[name]
    begin, end = entry["data_offsets"]
    expected: type[errors.CheckpointError] = errors.TensorLayoutError
    if fault == "dtype":
        entry["dtype"] = "F4"
        expected, text = errors.UnknownDtypeError, f"tensor {name} has a dtype that adaptc does not read"
    elif fault == "short":
        entry["data_offsets"] = [begin, end - 1]
        text = f"tensor {name} has a wrong number of bytes"
    elif fault == "long":
        entry["data_offsets"] = [begin, end + 1]
        text = f"tensor {name} has a wrong number of bytes"
    elif fault == "overlap":
        entry["data_offsets"] = [begin - 1, end - 1] if begin else [1, end + 1]
        text = f"tensor {name} (overlaps|leaves a gap after)"
    elif fault == "gap":
        entry["data_offsets"] = [begin + 1, end + 1]
        text = "leaves a gap after|overlaps|ends inside"
    else:
        header["base_model.model.../../../etc/passwd"] = header.pop(name)
        expected, text = errors.UnsafePathError, "contains a path separator"
    file.write_bytes(raw_file(header, body))
    with pytest.raises(expected, match=text):
        checkpoint.read_adapter(tmp_path)


def test_bytes_that_belong_to_no_tensor(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors.torch.save(tensors()) + b"payload")
    with pytest.raises(errors.TensorLayoutError, match="holds bytes that belong to no tensor"):
        read_tensor_file(file)


def test_an_empty_file_of_tensors_is_legal(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors.torch.save({}))
    assert read_tensor_file(file) == ({}, {})


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_at_every_position(tmp_path: Path, name: str, value: float) -> None:
    write(tmp_path)
    bad = tensors()
    bad[name].view(-1)[1] = value
    safetensors.torch.save_file(bad, tmp_path / "adapter_model.safetensors")
    with pytest.raises(errors.NonFiniteError, match=f"tensor {re.escape(name)} in .* holds NaN") as error:
        checkpoint.read_adapter(tmp_path)
    assert f"1 of {bad[name].numel()} values are not finite" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_checked_too(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.tensor([1.0, 2.0]).to(dtype)}, file)
    assert read_tensor_file(file)[0]["a"].float().tolist() == [1.0, 2.0]
    safetensors.torch.save_file({"a": torch.tensor([1.0, math.nan]).to(dtype)}, file)
    with pytest.raises(errors.NonFiniteError, match=r"tensor a in .* holds NaN"):
        read_tensor_file(file)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", errors.ConfigSyntaxError, "is not legal JSON"),
        ("", errors.ConfigSyntaxError, "is not legal JSON"),
        ('{"r": NaN}', errors.ConfigSyntaxError, "is not legal JSON"),
        ('{"r": 1, "r": 2}', errors.ConfigSyntaxError, "is not legal JSON"),
        ("[" * 100_000, errors.ConfigSyntaxError, "is not legal JSON"),
        ('["LORA"]', errors.ConfigSyntaxError, "is not a JSON object"),
        ("{}", errors.ConfigError, "does not name its kind"),
        ('{"peft_type": 3}', errors.ConfigError, "does not name its kind"),
    ],
)
def test_a_config_that_is_not_one(tmp_path: Path, text: str, kind: type[Exception], message: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(kind, match=message) as error:
        checkpoint.read_adapter(tmp_path)
    assert type(error.value) is kind


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"format": 2}, errors.ConfigError, "has a format that this version does not read"),
        ({"plan": []}, errors.ConfigError, "plan is not an object"),
        ({"base": "x"}, errors.ConfigError, "base is not an object"),
    ],
)
def test_a_plan_file_that_is_not_one(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    write(tmp_path)
    file = tmp_path / "adaptc_plan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(kind, match=message):
        checkpoint.read_adapter(tmp_path)


@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
@example(changes=[(0.0, 255)])
def test_any_damage_is_a_checkpoint_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]]
) -> None:
    """Bytes changed anywhere: values may differ, but nothing else than a CheckpointError is raised."""
    data = bytearray(safetensors.torch.save(tensors(), metadata={"format": "pt"}))
    for where, value in changes:
        data[round(where * (len(data) - 1))] = value
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    file.write_bytes(data)
    try:
        found, _ = read_tensor_file(file)
    except errors.CheckpointError:
        return
    assert len(found) == len(NAMES)
