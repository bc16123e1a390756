"""Adapter files: writing, reading, interrupted saves, names and links."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adaptc import errors
from adaptc.files import checkpoint
from adaptc.runtime import names
from tests.files.adapter_files import CONFIG, NAMES, PLAN, same_tensors, tensors, write

# -- writing and reading ----------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    base = {"class": "Host", "sites": {}}
    path = write(tmp_path / "new" / "place", fingerprint=base)
    read = checkpoint.read_adapter(path)
    assert read.config == {**CONFIG, "seed": 0}
    assert same_tensors(read.tensors, tensors())
    assert (read.plan, read.fingerprint, read.metadata) == (PLAN, base, {"format": "pt"})
    assert sorted(p.name for p in path.iterdir()) == [
        "adaptc_plan.json", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_the_order_of_patterns_in_a_plan_is_kept(tmp_path: Path) -> None:
    plan = {"rules": [{"method": {"rank_pattern": {"q": 1, "b": 2, "a": 3}}}]}
    write(tmp_path, plan=plan)
    read = checkpoint.read_adapter(tmp_path).plan
    assert read is not None and list(read["rules"][0]["method"]["rank_pattern"]) == ["q", "b", "a"]


def test_weight_file_is_the_one_of_the_library_and_others_may_read_it(tmp_path: Path) -> None:
    write(tmp_path)
    expected = safetensors.torch.save(tensors(), metadata={"format": "pt"})
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == expected
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_transposed_and_shared_tensors_are_stored(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    write(tmp_path, tensors={"a": weight.T, "b": weight, "c": weight, "d": weight[1:]})
    read = checkpoint.read_adapter(tmp_path).tensors
    assert same_tensors(read, {"a": weight.T, "b": weight, "c": weight, "d": weight[1:]})


def test_a_save_keeps_the_other_files_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path / "other")
    write(tmp_path)
    write(tmp_path, seed=1)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert same_tensors(checkpoint.read_adapter(tmp_path / "other").tensors, tensors(0))
    assert same_tensors(checkpoint.read_adapter(tmp_path).tensors, tensors(1))


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_save_refuses_numbers_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    write(tmp_path)
    bad = tensors(1)
    bad[name].view(-1)[-1] = value
    with pytest.raises(errors.NonFiniteError, match=rf"tensor {re.escape(name)} in the adapter holds NaN"):
        write(tmp_path, tensors=bad, seed=1)
    assert same_tensors(checkpoint.read_adapter(tmp_path).tensors, tensors(0))


def test_a_save_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(errors.CheckpointError, match=r"cannot save an adapter to .*x"):
        write(tmp_path / "x")


def test_a_plan_beside_a_config_that_was_changed_is_ignored_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    with pytest.warns(
        errors.AdaptcWarning, match="adaptc_plan.json is ignored: adapter_config.json was changed"
    ):
        read = checkpoint.read_adapter(tmp_path)
    assert read.plan is None and read.config["r"] == 3


# -- interrupted saves ------------------------------------------------------------------------------------

STEPS = ("mkdir", "fsync", "rename", "replace", "rmdir")


class Crash(BaseException):
    """The process dies: no cleanup that follows has any effect."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """From the ``step``-th file-system call on, every call fails; returns how many were made."""
    made = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made > step:
                raise Crash
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    return lambda: made


def calls_of_a_save() -> int:
    with pytest.MonkeyPatch.context() as patch:
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "x"
            write(path)
            made = crash_at(patch, 10**6)
            write(path, seed=1)
            count = made()
            patch.undo()
    return count


CALLS = calls_of_a_save()


@pytest.mark.parametrize("step", range(CALLS))
def test_a_crash_at_any_step_leaves_the_old_or_the_new_adapter(tmp_path: Path, step: int) -> None:
    write(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            write(tmp_path, seed=1)
    read = checkpoint.read_adapter(tmp_path)
    seed = read.config["seed"]
    assert same_tensors(read.tensors, tensors(seed))
    assert read.plan == PLAN  # the plan's file belongs to the same config, or it would be ignored
    write(tmp_path, seed=2)
    assert same_tensors(checkpoint.read_adapter(tmp_path).tensors, tensors(2))
    assert len(list(tmp_path.iterdir())) == 3, "leftovers of the interrupted save"


def test_both_outcomes_of_a_crash_occur(tmp_path: Path) -> None:
    seeds = []
    for step in range(CALLS):
        write(tmp_path / str(step))
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, step)
            with pytest.raises(Crash):
                write(tmp_path / str(step), seed=1)
        seeds.append(checkpoint.read_adapter(tmp_path / str(step)).config["seed"])
    assert seeds == sorted(seeds) and set(seeds) == {0, 1}


@pytest.mark.parametrize("step", range(CALLS))
def test_a_crash_of_the_first_save_leaves_nothing_or_the_adapter(tmp_path: Path, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            write(tmp_path)
    try:
        assert same_tensors(checkpoint.read_adapter(tmp_path).tensors, tensors(0))
    except errors.CheckpointNotFoundError:
        write(tmp_path, seed=1)
        assert same_tensors(checkpoint.read_adapter(tmp_path).tensors, tensors(1))


def test_a_full_disk_raises_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 3
    assert same_tensors(checkpoint.read_adapter(tmp_path).tensors, tensors(0))


def test_an_interrupted_save_and_a_later_change_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, CALLS - 4)
        with pytest.raises(Crash):
            write(tmp_path, seed=1)
    commit = tmp_path / ".adaptc-commit"
    waiting = sorted(p.name for p in commit.iterdir())
    assert waiting
    later = (commit / waiting[0]).stat().st_mtime_ns + 10**9
    (tmp_path / waiting[0]).write_bytes((tmp_path / waiting[0]).read_bytes())
    os.utime(tmp_path / waiting[0], ns=(later, later))
    with pytest.raises(errors.InterruptedSaveError, match=f"{waiting[0]} was written again since"):
        checkpoint.read_adapter(tmp_path)


# -- names and links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "sft", "sft-v2", "_x", "Adapter_1", "a" * 100])
def test_legal_names(name: str) -> None:
    names.check_adapter_name(name, ["model.layers.0.q_proj"])


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "..", ".", "a\\b", "a\0b"])
def test_names_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.UnsafePathError, match="would leave its directory"):
        names.adapter_directory(tmp_path, name)


@pytest.mark.parametrize("name", ["", "a.b", "1st", "-x", "a b", "é", "a" * 101, "a\n"])
def test_names_that_are_no_words(name: str) -> None:
    with pytest.raises(errors.AdapterNameError, match="is not a legal adapter name"):
        names.check_adapter_name(name)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("weight", "PEFT's keys"),
        ("lora", "PEFT's keys"),
        ("lora_A", "PEFT's keys"),
        ("modules_to_save", "PEFT's keys"),
        ("keys", "torch.nn.ModuleDict"),
        ("train", "torch.nn.ModuleDict"),
        ("training", "torch.nn.ModuleDict"),
        ("_modules", "torch.nn.ModuleDict"),
        ("layers", "a module of the model"),
    ],
)
def test_names_that_are_taken(name: str, owner: str) -> None:
    with pytest.raises(errors.AdapterNameError, match=f"{owner} has that name"):
        names.check_adapter_name(name, ["model.layers.0.q_proj"])


def test_default_lies_at_the_root_and_others_below(tmp_path: Path) -> None:
    assert names.adapter_directory(tmp_path, "default") == tmp_path
    assert names.adapter_directory(str(tmp_path), "sft") == tmp_path / "sft"


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    (root / "sft").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.UnsafePathError, match="leads out of"):
        names.adapter_directory(root, "sft")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adaptc_plan.json"])
def test_files_that_are_links_out_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    shutil.move(tmp_path / "a" / name, tmp_path / name)
    (tmp_path / "a" / name).symlink_to(tmp_path / name)
    with pytest.raises(errors.UnsafePathError, match=f"{name} is a link that leaves its directory"):
        checkpoint.read_adapter(tmp_path / "a")


def test_links_out_of_an_interrupted_save_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    (tmp_path / "a" / ".adaptc-commit").mkdir()
    planted = tmp_path / "b" / "adapter_model.safetensors"
    (tmp_path / "a" / ".adaptc-commit" / "adapter_model.safetensors").symlink_to(planted)
    with pytest.raises(errors.UnsafePathError, match="is a link that leaves its directory"):
        checkpoint.read_adapter(tmp_path / "a")


def test_a_save_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    write(tmp_path / "a")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / name).unlink()
        (tmp_path / "a" / name).symlink_to(victim)
    write(tmp_path / "a", seed=1)
    assert victim.read_text() == "precious"
    assert same_tensors(checkpoint.read_adapter(tmp_path / "a").tensors, tensors(1))


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    write(snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        shutil.move(file, blobs / f"blob-{file.name}")
        file.symlink_to(Path("../../blobs") / f"blob-{file.name}")
    assert same_tensors(checkpoint.read_adapter(snapshot).tensors, tensors(0))
    link = tmp_path / "latest"
    link.symlink_to(snapshot)
    assert same_tensors(checkpoint.read_adapter(link).tensors, tensors(0))


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"adapter_config\.json is not a file"):
        checkpoint.read_adapter(tmp_path)
