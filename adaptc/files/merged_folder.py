"""Writing a base's folder anew, with other values, dtypes or rows of some of its tensors.

Everything is written into a folder beside the new one, synced and renamed: the new folder is there whole or not at all.
The files of weights have the tensors, and where nothing else changes also the bytes of the header, of the base's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import CheckpointError
from adaptc.files.base_folder import CONFIG, INDEX, OTHER_WEIGHTS, BaseFolder
from adaptc.files.mapped import MappedFile, Row
from adaptc.files.tensor_file import DTYPES, check_header
from adaptc.methods.affine import nearest
from adaptc.runtime.weights.keep import bits

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def staged(directory: Any, sources: Sequence[Path]) -> Iterator[Path]:
    """A block that fills a folder, which becomes ``directory`` at its end, or is removed if the block fails.

    ``sources``: folders that are read.

    Raises:
        CheckpointError: there is something at ``directory``, it is inside a folder that is read, or there is no room.
    """
    out = Path(directory).absolute()
    if out.is_symlink() and out.is_dir():
        out = out.resolve()  # what it points at becomes the folder
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{out} is inside {source}, which is read", do="give a directory of its own")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        found = ", ".join(sorted(p.name for p in out.iterdir())[:5]) if out.is_dir() else "a file"
        raise CheckpointError(f"{out} is there already", expected="a new or empty directory", found=found)
    missing = [path for path in out.parents if not path.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.adaptc-staging-{uuid.uuid4().hex[:12]}"
    staging.mkdir()
    try:
        yield staging
        for folder, _, _ in os.walk(staging):
            _sync(Path(folder))
        if out.is_dir():
            out.rmdir()
        os.rename(staging, out)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CheckpointError(f"no room for {out} on the disk", found=error, do="nothing was written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for path in missing:
            with contextlib.suppress(OSError):  # there is something in it now
                path.rmdir()
    _sync(out.parent)


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class MergedWeights:
    """The files of weights of the new folder, on the disk as the base's but for the tensors that are ``changed``, which
    are to be written.

    Args:
        dtype: of floating-point tensors; None: as in the base.
        shapes: name of a tensor -> its shape, where that is another one than the base's.
    """

    def __init__(
        self, base: BaseFolder, folder: Path, dtype: torch.dtype | None, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        self.base, self.folder = base, folder
        self._files: dict[str, MappedFile] = {}
        self._file_of = {name: file for file, name in base.tensors()}
        for file, rows in base.files.items():
            wanted = {name: _row(name, row, dtype, shapes) for name, row in rows.items()}
            begin, size, placed = _layout(base.path / file, rows, wanted)
            self._files[file] = MappedFile.create(folder / file, placed, size, begin)

    def tensor(self, name: str) -> torch.Tensor:
        """Where the tensor of this name is written."""
        return self._files[self._file_of[name]].tensor(name)

    def copy(self, changed: Collection[str]) -> None:
        """Write every tensor that is not ``changed`` as the base has it, one at a time."""
        for file, rows in self.base.files.items():
            source = MappedFile.read(self.base.path / file, rows)
            for name in rows:
                if name in changed:
                    continue
                old, new = source.tensor(name), self.tensor(name)
                if old.dtype == new.dtype:
                    bits(new).copy_(bits(old))
                else:
                    new.copy_(nearest(old, new.dtype))
                source.let_go()
                self.let_go()

    def let_go(self) -> None:
        for file in self._files.values():
            file.let_go()

    def close(self, *, sync: bool) -> None:
        for file in self._files.values():
            file.close(sync=sync)

    def rows(self) -> Iterator[tuple[str, Row]]:
        return ((name, row) for file in self._files.values() for name, row in file.rows.items())


def _row(name: str, row: Row, dtype: torch.dtype | None, shapes: Mapping[str, Sequence[int]]) -> Row:
    old, shape, offset = row
    new = dtype if dtype is not None and old.is_floating_point else old
    return new, list(shapes.get(name, shape)), offset


def _bytes(row: Row) -> int:
    return torch.Size(row[1]).numel() * row[0].itemsize


def _layout(file: Path, before: Mapping[str, Row], wanted: Mapping[str, Row]) -> tuple[bytes, int, dict[str, Row]]:
    """The bytes before the tensors, the size of the new file, and the rows with their places in it."""
    size = file.stat().st_size
    if all(row[0] == before[name][0] and list(row[1]) == list(before[name][1]) for name, row in wanted.items()):
        with file.open("rb") as opened:
            return opened.read(size - sum(map(_bytes, before.values()))), size, dict(wanted)
    with file.open("rb") as opened:
        metadata = check_header(opened, file)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    # As safetensors orders them: each is aligned to its own dtype.
    for name, row in sorted(wanted.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        header[name] = {"dtype": _NAMES[row[0]], "shape": list(row[1]), "data_offsets": [end, end + _bytes(row)]}
        end += _bytes(row)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    placed = {n: (wanted[n][0], wanted[n][1], len(begin) + header[n]["data_offsets"][0]) for n in wanted}
    return begin, len(begin) + end, placed


# ------------------------------------------------------------------------------------------ the rest


def write_rest(base: BaseFolder, folder: Path, weights: MergedWeights, changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Copy everything but the weights; returns the names of files that are left out because they hold weights too.

    ``changes``: entries of the config that are others.
    """
    left_out = _copy_others(base, folder)
    if changes:
        _write(folder / CONFIG, json.dumps(_updated(base.config, changes), indent=2) + "\n")
    else:
        _copy(base.path / CONFIG, folder / CONFIG)
    if base.index is not None:
        _write_index(base, folder, weights)
    return left_out


def _write_index(base: BaseFolder, folder: Path, weights: MergedWeights) -> None:
    """The index, in which only the sizes change."""
    assert base.index is not None
    before = {name: row for rows in base.files.values() for name, row in rows.items()}
    grown = sum(_bytes(row) - _bytes(before[name]) for name, row in weights.rows())
    more = sum(torch.Size(row[1]).numel() - torch.Size(before[name][1]).numel() for name, row in weights.rows())
    metadata = base.index.get("metadata")
    if not (grown or more) or not isinstance(metadata, dict):
        _copy(base.path / INDEX, folder / INDEX)
        return
    sizes = {"total_size": grown, "total_parameters": more}
    changed = {key: value + sizes[key] if key in sizes else value for key, value in metadata.items()}
    _write(folder / INDEX, json.dumps({**base.index, "metadata": changed}, indent=2) + "\n")


def _copy_others(base: BaseFolder, folder: Path) -> tuple[str, ...]:
    written = {CONFIG, *base.files, *([INDEX] if base.index is not None else [])}
    parts = _parts(base.path)
    left_out: list[str] = []
    for at, directories, files in os.walk(base.path):
        here = Path(at).relative_to(base.path)
        links = [name for name in directories if (Path(at) / name).is_symlink()]
        left_out += [f"{(here / name).as_posix()}/" for name in links]
        directories[:] = sorted(n for n in directories if not n.startswith(".") and n not in links)
        for name in sorted(files):
            path = here / name
            if path.as_posix() in written:
                continue
            if here.parts[:1] not in parts and _is_weights(name):
                left_out.append(path.as_posix())
                continue
            (folder / here).mkdir(parents=True, exist_ok=True)
            _copy(base.path / path, folder / path)
    return tuple(left_out)


def _parts(path: Path) -> set[tuple[str, ...]]:
    """The folders of the other modules, of a model whose modules have one each."""
    try:
        rows = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        return {(row["path"],) for row in rows if row["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _is_weights(name: str) -> bool:
    plain = name.removesuffix(".index.json")
    return plain.endswith((".safetensors", *OTHER_WEIGHTS))


def _updated(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(config)
    for key, value in changes.items():
        inner = new.get(key)
        new[key] = _updated(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return new


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def _write(target: Path, text: str) -> None:
    with target.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


__all__ = ["MergedWeights", "staged", "write_rest"]
