"""Where the bytes of overwritten tensors are kept: in memory, in a file of their own, or in the base's own files."""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from adaptc.errors import CheckpointError, UnsupportedError

#: ``None``: in the files that the base was read from.
Keep = Literal["memory", "disk"] | None
#: Of tensors in a file: the widest dtype has 16 bytes, and a cache line 64.
_ALIGNED = 64
#: Integers by size: through them bytes are copied whatever numbers they are.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of the base as one of its files holds it: mapped into memory, read where it is looked at."""

    tensor: torch.Tensor
    file: Path


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What tells whether a file was changed."""

    file: Path
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> Stamp:
        now = file.stat()
        return cls(file, now.st_ino, now.st_size, now.st_mtime_ns)

    def check(self) -> None:
        """Raise CheckpointError when the mapped file was written to. One that was replaced or removed is mapped still,
        as it was."""
        try:
            now = Stamp.of(self.file)
        except OSError:
            return
        if now.inode == self.inode and now != self:
            raise CheckpointError(
                f"{self.file} was changed while weights that it holds are merged: the base cannot be restored from it",
                expected=f"{self.size} bytes", found=f"{now.size} bytes, changed at {now.changed_ns} ns",
                do="load the base again; merge(keep='memory') does not depend on files",
            )  # fmt: skip


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that NaN payloads, infinities and signs of zeros are copied and compared."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


def map_file(file: Path, rows: Iterable[tuple[torch.dtype, Sequence[int], int]]) -> list[torch.Tensor]:
    """Tensors of a file, mapped; each has a storage of its own. What is written to them stays in this process.

    Args:
        rows: dtype, shape and offset in bytes of each.
    """
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return [view(memory, dtype, shape, offset) for dtype, shape, offset in rows]


def view(memory: mmap.mmap, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
    """The tensor that begins ``offset`` bytes into ``memory``."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(tuple(shape))


def in_memory(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the tensors' own devices."""
    with torch.inference_mode(False), torch.no_grad():
        return [_copy(t) for t in tensors]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(tensor.detach(), memory_format=torch.contiguous_format)
    bits(copy).copy_(bits(tensor.detach()))
    return copy


def on_disk(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in a file in the directory for temporary files, mapped. The file has no name any more, so that it is gone
    with the last of the copies, however the process ends."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    if end == 0:
        return in_memory(tensors)
    rows = [(t.dtype, t.shape, offset) for t, offset in zip(tensors, offsets, strict=True)]
    number, name = tempfile.mkstemp(prefix="adaptc-base-")
    try:
        with os.fdopen(number, "r+b") as file:
            reserve(file, end)
            memory = mmap.mmap(file.fileno(), end)
        copies = [view(memory, *row) for row in rows]
        with torch.inference_mode(False), torch.no_grad():
            for copy, tensor in zip(copies, tensors, strict=True):
                if tensor.numel():
                    bits(copy).copy_(bits(tensor.detach()))
        return copies
    finally:
        os.unlink(name)


def reserve(file: Any, size: int) -> None:
    """Raise OSError now where the disk has no room: writing to a mapped file would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    chunk = bytes(1 << 20)
    for start in range(0, size, len(chunk)):
        file.write(chunk[: size - start])
    file.flush()


def in_files(
    named: Sequence[tuple[Sequence[str], torch.Tensor]], find: Callable[[str], Stored | None]
) -> tuple[list[torch.Tensor], list[Stamp]]:
    """The tensors as the base's own files hold them under one of their paths, and what tells that these files were not
    changed.

    Raises:
        UnsupportedError: a tensor that no file holds, or with other bytes.
    """
    found: list[torch.Tensor] = []
    stamps: dict[Path, Stamp] = {}
    for paths, tensor in named:
        stored = next((s for path in paths if (s := find(path)) is not None), None)
        if stored is None:
            raise _not_in_files(paths[0], "no safetensors file of the base has it")
        stamps.setdefault(stored.file, Stamp.of(stored.file))
        reason = _difference(stored.tensor, tensor.detach().cpu())
        if reason is not None:
            raise _not_in_files(paths[0], f"{stored.file} {reason}")
        found.append(stored.tensor)
    return found, list(stamps.values())


def _difference(stored: torch.Tensor, own: torch.Tensor) -> str | None:
    if stored.dtype != own.dtype:
        return f"has it in {stored.dtype}, and the model in {own.dtype}"
    if stored.shape != own.shape:
        return f"has it in the shape {tuple(stored.shape)}, and the model in {tuple(own.shape)}"
    return None if torch.equal(bits(stored), bits(own)) else "holds other values than the model"


def _not_in_files(path: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"merge(keep=None): {path} could not be restored from the base's files",
        expected="the safetensors files that the base was read from, with the values that it has", found=found,
        do="merge(keep='memory') or merge(keep='disk')",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ room


def check_room(tensors: Sequence[torch.Tensor], keep: Keep) -> None:
    """Raise UnsupportedError when the copies of ``tensors`` do not fit into what is free."""
    if keep is None:
        return
    needs: dict[str, int] = {}
    for tensor in tensors:
        where = "disk" if keep == "disk" else str(tensor.device)
        needs[where] = needs.get(where, 0) + tensor.nbytes
    for where, needed in needs.items():
        free = free_disk() if where == "disk" else free_memory(torch.device(where))
        if free is not None and needed > free:
            others = {"disk": "keep='memory'"}.get(where, "keep='disk'")
            raise UnsupportedError(
                "merge: the base's weights that are to be kept do not fit",
                expected=f"{needed:,} bytes free on {where}", found=f"{free:,} bytes",
                do=f"merge(..., {others}), or keep=None where the base's files are here",
            )  # fmt: skip


def free_disk() -> int:
    """Bytes that are free where temporary files are."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device``; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [n for n in (_available(), _left_to_the_group()) if n is not None]
    return min(known, default=None)


def _available() -> int | None:
    """What Linux says that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _left_to_the_group() -> int | None:
    """What the limit of a container leaves; files that were read count as free."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((root / f"memory.{name}").read_text()) for name in ("max", "current"))
        rows = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(rows["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None


__all__ = [
    "Keep", "Stamp", "Stored", "bits", "check_room", "in_files", "in_memory", "map_file", "on_disk", "reserve", "view",
]  # fmt: skip
