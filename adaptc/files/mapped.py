"""Files of tensors that are mapped into memory: a byte is in memory when it is looked at, and may be let go after."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from adaptc.runtime.weights.keep import reserve, view

#: dtype, shape and offset in bytes of a tensor in a file.
Row = tuple[torch.dtype, Sequence[int], int]
_ALIGNED = 64


class MappedFile:
    """The tensors of one file by their names.

    What is written to tensors of a file that was opened to be read stays in this process.
    """

    def __init__(self, memory: mmap.mmap | None, rows: Mapping[str, Row], number: int | None = None) -> None:
        self.rows = dict(rows)
        self._memory, self._number = memory, number

    @classmethod
    def read(cls, file: Path, rows: Mapping[str, Row]) -> MappedFile:
        with file.open("rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return cls(memory, rows)

    @classmethod
    def create(cls, file: Path, rows: Mapping[str, Row], size: int, begin: bytes = b"") -> MappedFile:
        """A new file of ``size`` bytes, with room on the disk; ``begin``: its first bytes.

        Raises:
            OSError: the disk has no room, or there is such a file.
        """
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(os.dup(number), "r+b") as opened:
            if size:
                reserve(opened, size)
            opened.seek(0)
            opened.write(begin)
        return cls(mmap.mmap(number, size) if size else None, rows, number)

    @classmethod
    def scratch(cls, file: Path, rows: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> MappedFile:
        """As :meth:`create`, for tensors in any places. The file has no name any more; its bytes are gone with it."""
        found: dict[str, Row] = {}
        end = 0
        for name, (dtype, shape) in rows.items():
            found[name] = (dtype, shape, end)
            end += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNED) * _ALIGNED
        made = cls.create(file, found, end)
        file.unlink()
        return made

    def tensor(self, name: str) -> torch.Tensor:
        dtype, shape, offset = self.rows[name]
        if self._memory is None:
            return torch.empty(tuple(shape), dtype=dtype)
        return view(self._memory, dtype, shape, offset)

    def let_go(self) -> None:
        """Take the file's pages out of this process; they are read again where they are looked at."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def close(self, *, sync: bool = False) -> None:
        """``sync``: what was written is on the disk then. The tensors stay mapped as long as they are held."""
        if self._number is not None:
            if sync:
                if self._memory is not None:
                    self._memory.flush()
                os.fsync(self._number)
            os.close(self._number)
            self._number = None


__all__ = ["MappedFile", "Row"]
