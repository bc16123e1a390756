"""The C++ beside this file: one ``.cpp`` for each library, the headers that they share, and what Python tells them."""

from __future__ import annotations

import pathlib
import re

import torch

from adaptc.codegen.cpp.takes import FEWEST_ROWS, IN_CPP, MOST_RANKS
from adaptc.ir.ops import dropout
from adaptc.torch_internals import cpu_emulates

#: Elements below which a second thread costs more than it does, where each is read once.
GRAIN_ELEMENTS = 1 << 15
FOLDER = pathlib.Path(__file__).parent
_OURS = re.compile(r'^#(?:pragma once|include "(.+)")\n', re.MULTILINE)


def constants() -> str:
    """``constants.h``, for this CPU; a compiler that is given a file by itself needs it on its path."""
    numbers = {"MOST_RANKS": MOST_RANKS, "FEWEST_ROWS": FEWEST_ROWS, "GRAIN_ELEMENTS": GRAIN_ELEMENTS}
    return "\n".join([
        "#pragma once", "#include <cstdint>",
        *(f"constexpr int64_t {name} = {value};" for name, value in numbers.items()),
        *(f"constexpr uint32_t HASH_{name} = 0x{value & 0xFFFFFFFF:X}u;" for name, value in dropout.HASH.items()),
        f"constexpr bool EMULATES = {'true' if cpu_emulates(torch.bfloat16) else 'false'};",
        " \\\n".join(["#define RULES", *IN_CPP.splitlines()]), "",
    ])  # fmt: skip


def text_of(name: str) -> str:
    """The file ``name`` with ours that it includes, each once: the cache of compiled C++ keys on the text alone."""
    read: set[str] = set()

    def text(name: str) -> str:
        if name in read:
            return ""
        read.add(name)
        whole = constants() if name == "constants.h" else (FOLDER / name).read_text()
        return _OURS.sub(lambda found: text(found[1]) if found[1] else "", whole)

    return text(name)
