"""The dialect's products with a small side on a CPU, without Python around them, by the kernels that ``takes`` gives.

Python does what no kernel takes, and all of it until the libraries are there.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from adaptc import torch_internals
from adaptc.codegen.cpp.sources import text_of


@functools.cache
def _library() -> Any:
    return torch_internals.load_cpp(text_of("products.cpp"))


def found(kernels: str, library: Any) -> None:
    """Have torch call the kernels of ``library``, "skinny" or "pairs", from now on."""
    if _library() is not None:
        library.products.restype = ctypes.c_void_p
        getattr(_library(), f"found_{kernels}")(ctypes.c_void_p(library.products()))
