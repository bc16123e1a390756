"""``adaptc merge`` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import adaptc
from adaptc.cli.app import app
from tests.runtime.weights import cases

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter for it."""
    folder = tmp_path_factory.mktemp("given")
    model = cases.llama().to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    cases.compiled(model, adaptc.LoRA(r=2, targets=["q_proj"], init="random")).adaptc.save(folder / "adapter")
    return folder


def merge(given: Path, out: Path, *options: str) -> tuple[int, str, str]:
    found = RUNNER.invoke(app, ["merge", str(given / "base"), str(given / "adapter"), str(out), *options])
    return found.exit_code, found.stdout, found.stderr


def test_it_writes_what_the_function_writes_and_says_what(given: Path, tmp_path: Path) -> None:
    status, told, errors = merge(given, tmp_path / "out")
    report = adaptc.merge_checkpoint(given / "base", given / "adapter", tmp_path / "want")
    assert (status, errors) == (0, "")
    assert told == str(report).replace(str(tmp_path / "want"), str(tmp_path / "out")) + "\n"
    assert "2 tensors merged" in told and "model.layers.0.self_attn.q_proj.weight" in told
    for file in (tmp_path / "want").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_the_dtype_is_an_option(given: Path, tmp_path: Path) -> None:
    assert merge(given, tmp_path / "out", "--dtype", "float32")[0] == 0
    adaptc.merge_checkpoint(given / "base", given / "adapter", tmp_path / "want", dtype=torch.float32)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "want" / weights).read_bytes()
    assert merge(given, tmp_path / "other", "--dtype", "int8")[0] == 2


def test_what_is_refused_is_told_without_a_traceback(given: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    status, told, errors = merge(given, tmp_path / "out")
    assert (status, told) == (1, "") and "is there already" in errors and "Traceback" not in errors


def test_what_is_left_out_is_told_beside_the_report(given: Path, tmp_path: Path) -> None:
    (given / "base/pytorch_model.bin").write_bytes(b"weights")
    try:
        status, told, errors = merge(given, tmp_path / "out")
    finally:
        (given / "base/pytorch_model.bin").unlink()
    assert status == 0 and "tensors merged" in told
    assert errors.startswith("warning: ") and "pytorch_model.bin" in errors


def test_help_names_its_arguments() -> None:
    shown = RUNNER.invoke(app, ["merge", "--help"], env={"COLUMNS": "120", "TERM": "dumb"}).output
    assert all(word in shown for word in ("BASE", "ADAPTER", "OUT", "--dtype", "bfloat16"))
