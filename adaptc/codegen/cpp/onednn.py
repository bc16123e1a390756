"""``adaptc::onednn_linear`` without Python around it: oneDNN's product by torch's C interface."""

from __future__ import annotations

import functools
from typing import Any

from adaptc import torch_internals
from adaptc.codegen.cpp.sources import text_of


@functools.cache
def library() -> Any:
    """Compiled, from when on torch calls it; None without a C++ compiler."""
    return torch_internals.load_cpp(text_of("onednn.cpp"))
