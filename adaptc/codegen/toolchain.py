"""Whether Inductor can generate code on this machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from adaptc import torch_internals


def inductor_missing() -> str | None:
    """Why Inductor cannot compile for the CPU here, or None."""
    if reason := torch_internals.inductor_missing():
        return f"it needs a C++ compiler, and found none ({reason})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"its C++ code needs Python's headers, and there is no {header}"
