"""Pickled models of earlier versions: they name modules as these were called in the version that wrote them.

Plans, adapter folders and ``state_dict`` files are read by every version.
"""

from __future__ import annotations

import sys
from types import ModuleType

from adaptc.errors import UnsupportedError

#: Modules that are gone, one of which every pickle of a compiled model names first.
_GONE = {"adaptc.codegen.backend", "adaptc.runtime.handle", "adaptc.runtime.prologue", "adaptc.runtime.saving"}


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name in _GONE:
            raise UnsupportedError(
                "a compiled model that an earlier version pickled cannot be read",
                found=f"it names {name}",
                do="read it with the version that wrote it, and model.adaptc.save(folder) there;"
                " then adaptc.compile(base, folder) here",
            )


def refuse() -> None:
    """Say so where such a pickle is read."""
    sys.meta_path.append(_Finder)
