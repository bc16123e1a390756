"""Adapter files: reading that validates before it returns, and writing that a crash cannot spoil.

A directory of an adapter holds ``adapter_config.json`` and ``adapter_model.safetensors``, both as PEFT
writes and reads them, and ``adaptc_plan.json`` (the plan in adaptc's own words and a fingerprint of the
base), which PEFT ignores. An adapter that PEFT's format cannot express has no ``adapter_config.json``, so that
PEFT finds no adapter there and says so: adaptc's own format.

Saving replaces three files, and a file system renames only one at a time. So a save is a small journal:

1. the new files are written and synced in a staging directory beside the old ones;
2. the staging directory is renamed to ``.adaptc-commit``: from here on the save has happened;
3. its files are moved over the old ones, and the empty directory is removed.

``read_adapter`` prefers a file in ``.adaptc-commit``, so after a crash before step 2 it reads the old
adapter and after a crash in step 3 the new one; the next save finishes the moves. Readers that do not know
the journal (PEFT) can see a mixture only after a crash in step 3. The directory itself is not swapped: it
may hold other adapters, a model card, or a trainer's files. Saves of several
processes to one directory wait for each other (on POSIX, where the file system has locks).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch

from adaptc.errors import (
    AdaptcWarning,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ConfigSyntaxError,
    InterruptedSaveError,
    PickleRefusedError,
    UnsafePathError,
)
from adaptc.files.tensor_file import check_finite, read_tensor_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PLAN = "adaptc_plan.json"
FORMAT_VERSION = 1
MAX_JSON = 64 * 2**20
_COMMIT = ".adaptc-commit"
_STAGING = ".adaptc-staging-"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's directory holds; every part is valid by itself.

    ``plan`` and ``fingerprint`` are None when another tool wrote the adapter, or changed its config since.
    ``config`` is None in adaptc's own format; ``plan`` is there then.
    """

    config: dict[str, Any] | None
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    plan: dict[str, Any] | None
    fingerprint: dict[str, Any] | None
    path: Path


# ------------------------------------------------------------------------------------------- reading


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Read and validate an adapter's directory; nothing is returned unless all of it is sound.

    Raises:
        CheckpointError: the subclass says what is wrong. Whether the config and the tensors fit a model is
            for ``peft_format`` to say.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"no adapter directory {path}",
            found="a file" if path.exists() else "nothing", do=f"give the directory that holds {CONFIG}",
        )  # fmt: skip
    config_file, weights_file, plan_file = _locate_config(path), _locate(path, WEIGHTS), _locate(path, PLAN)
    if weights_file is None:
        _raise_no_weights(path)
    raw_config, config = b"", None
    if config_file is not None:
        raw_config = _read_bytes(config_file)
        config = _parse_object(raw_config, config_file)
        if not isinstance(config.get("peft_type"), str):
            raise ConfigError(
                f"{config_file} does not name its kind",
                expected='peft_type, such as "LORA"', found=repr(config.get("peft_type")),
                do="this is not a PEFT adapter; convert it with the library that wrote it",
            )  # fmt: skip
    elif plan_file is None or not _is_own_format(plan_file):
        raise CheckpointNotFoundError(
            f"no {CONFIG} in {path}",
            found=_listing(path),
            do="give the directory that PEFT or adaptc saved to",
        )
    plan, base = _read_plan(plan_file, None if config is None else raw_config)
    tensors, metadata = read_tensor_file(weights_file)
    return AdapterFiles(config, tensors, metadata, plan, base, path)


def weights_in(directory: str | os.PathLike[str]) -> Path | None:
    """The file of an adapter's weights that :func:`read_adapter` reads, if there is one."""
    return _locate(Path(directory), WEIGHTS)


def _locate_config(directory: Path) -> Path | None:
    """As ``_locate``; what an interrupted save in adaptc's own format was about to remove is not there."""
    committed = directory / _COMMIT
    if (committed / PLAN).is_file() and not (committed / CONFIG).is_file() and _is_own_format(committed / PLAN):
        _check_older(directory / CONFIG, committed / PLAN)
        return None
    return _locate(directory, CONFIG)


def _is_own_format(plan_file: Path) -> bool:
    return _parse_object(_read_bytes(plan_file), plan_file).get("config_sha256", "") is None


def _locate(directory: Path, name: str) -> Path | None:
    """The newest committed file of that name, or None; raises when links lead it elsewhere."""
    committed, plain = directory / _COMMIT / name, directory / name
    if not os.path.lexists(committed):
        if not os.path.lexists(plain):
            return None
        _check_link(plain, directory)
        return plain
    _check_older(plain, committed)
    _check_link(committed, directory)
    return committed


def _check_older(plain: Path, committed: Path) -> None:
    """Raise when the file in place was written after the save that is to replace it."""
    if plain.exists() and plain.stat().st_mtime_ns > committed.stat().st_mtime_ns:
        directory = plain.parent
        raise InterruptedSaveError(
            f"a save to {directory} was interrupted, and {plain.name} was written again since",
            found=f"{committed} is older than {plain}",
            do=f"remove {directory / _COMMIT} to keep the newer files, or move its files over them",
        )


def _check_link(file: Path, directory: Path) -> None:
    """Files may be links within the directory, or into the blobs of the Hub cache that it is part of."""
    target, home = file.resolve(), directory.resolve()
    allowed = [home]
    allowed += [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"][:1]
    if not any(target.is_relative_to(place) for place in allowed):
        raise UnsafePathError(
            f"{file} is a link that leaves its directory", found=target, do="replace the link by the file"
        )
    if not target.is_file():
        raise CheckpointNotFoundError(f"{file} is not a file", found="a directory or a broken link")


def _raise_no_weights(path: Path) -> NoReturn:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise PickleRefusedError(
            f"{path} holds its weights as a pickle file, which can run any code when it is read",
            expected=WEIGHTS, found=", ".join(pickles),
            do="if you trust it, load it with PEFT and save it again with safe_serialization=True",
        )  # fmt: skip
    raise CheckpointNotFoundError(
        f"no {WEIGHTS} in {path}", found=_listing(path), do="give the directory that PEFT or adaptc saved to"
    )


def _listing(path: Path) -> str:
    """What a directory holds, naming adapters in sub-directories, where PEFT puts all but "default"."""
    names = sorted(p.name for p in path.iterdir())
    below = [n for n in names if (path / n / CONFIG).is_file()]
    if below:
        return f"adapters in the sub-directories {', '.join(below)}"
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "an empty directory"


def _read_bytes(file: Path) -> bytes:
    size = file.stat().st_size
    if size > MAX_JSON:
        raise ConfigSyntaxError(
            f"{file} is too large", expected=f"at most {MAX_JSON} bytes", found=f"{size} bytes"
        )
    return file.read_bytes()


def _parse_object(raw: bytes, file: Path) -> dict[str, Any]:
    """A JSON object with distinct names and finite numbers."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigSyntaxError(
            f"{file} is not legal JSON", found=error, do="correct it, or copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigSyntaxError(f"{file} is not a JSON object", found=type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return dict(pairs)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _read_plan(file: Path | None, raw_config: bytes | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The plan and the fingerprint of ``adaptc_plan.json``, unless its config is not this one (None: no config)."""
    if file is None:
        return None, None
    saved = _parse_object(_read_bytes(file), file)
    if saved.get("format") != FORMAT_VERSION:
        raise ConfigError(
            f"{file} has a format that this version does not read",
            expected=f"format {FORMAT_VERSION}", found=repr(saved.get("format")),
            do=f"update adaptc, or remove {PLAN} to load by {CONFIG} alone",
        )  # fmt: skip
    plan, base = saved.get("plan"), saved.get("base")
    for name, value in (("plan", plan), ("base", base)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{file}: {name} is not an object", found=type(value).__name__)
    if raw_config is None:
        if plan is None:
            raise ConfigError(f"{file} holds no plan", do=f"an adapter without {CONFIG} needs one")
    elif saved.get("config_sha256") != hashlib.sha256(raw_config).hexdigest():
        warnings.warn(
            f"{file} is ignored: {CONFIG} was changed after adaptc wrote it", AdaptcWarning, stacklevel=4
        )
        return None, None
    return plan, base


# ------------------------------------------------------------------------------------------- writing


def write_adapter(
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor],
    plan: Mapping[str, Any] | None,
    fingerprint: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter so that a crash at any moment leaves the old or the new one readable.

    The weight file is PEFT's, byte for byte, when ``metadata`` is not given (with more than one entry the
    library orders them at random). A tensor with NaN or infinity is refused: no loader would take it back.
    ``config`` None writes adaptc's own format, and removes the config of an earlier adapter.

    Raises:
        NonFiniteError: names the tensor; nothing was written.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"cannot save an adapter to {path}", expected="a directory", found="a file")
    files = _contents(path, config, tensors, plan, fingerprint, metadata or {})
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _finish_commit(path)
        _commit(path, files)
        _finish_commit(path)
    return path


def _commit(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the files aside, and rename their directory: steps 1 and 2 of the journal."""
    staging = path / f"{_STAGING}{uuid.uuid4().hex[:12]}"
    try:
        staging.mkdir()
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(staging)
        os.rename(staging, path / _COMMIT)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """A block that one process of a machine at a time runs for ``directory``; the others wait.

    Processes that train one model together may all save it: each save is complete, and the last one stays.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _contents(
    path: Path,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor],
    plan: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """File name -> bytes, complete and checked before anything is written."""
    stored: dict[str, torch.Tensor] = {}
    storages = set()
    for key, tensor in tensors.items():
        check_finite(
            key, tensor, where="the adapter",
            do="find the step at which training diverged; the adapter was not saved",
        )  # fmt: skip
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory (tied heads), as PEFT finds too.
        storage = plain.untyped_storage().data_ptr()
        stored[key] = plain.clone() if storage in storages else plain
        storages.add(storage)
    raw_config = None if config is None else json.dumps(dict(config), indent=2, sort_keys=True).encode()
    own = {
        "format": FORMAT_VERSION,
        "plan": plan,
        "base": base,
        "config_sha256": None if raw_config is None else hashlib.sha256(raw_config).hexdigest(),
    }
    return {
        **({} if raw_config is None else {CONFIG: raw_config}),
        WEIGHTS: safetensors.torch.save(stored, metadata={"format": "pt", **metadata}),
        PLAN: json.dumps(own, indent=2).encode(),  # unsorted: the first pattern that matches counts
    }


def _finish_commit(path: Path) -> None:
    """Move the files of a committed save to their places and clear what interrupted saves left behind."""
    for stale in path.glob(f"{_STAGING}*"):
        shutil.rmtree(stale)
    commit = path / _COMMIT
    if not commit.is_dir():
        return
    if _locate_config(path) is None:
        (path / CONFIG).unlink(missing_ok=True)
    for name in (WEIGHTS, CONFIG, PLAN):  # the plan last: it says whether there is to be a config
        file = _locate(path, name)  # raises when the file in place was written after the commit
        if file is not None and file.parent == commit:
            os.replace(file, path / name)
    _sync(path)
    commit.rmdir()


def _sync(directory: Path) -> None:
    """Make renames in a directory durable, where the platform can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)
