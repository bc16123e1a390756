"""Which kernels make a product with one small side (a rank) on a CPU: for ops outside a graph, for nodes, and in C++.

A product of ``x`` (rows, width) is made by the first of ``RULES`` that holds for it and whose library is there; by the
libraries of torch where none does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from adaptc.torch_internals import cpu_emulates, has_avx512_bf16, size_hint

#: Ranks, of all sites together, up to which the libraries were slower wherever it was measured.
MOST_RANKS = 64
#: Rows from which on that is so in fp32: a factor is packed for every call.
FEWEST_ROWS = 128


class Rule(NamedTuple):
    """What one library takes. ``few``: up to ``MOST_RANKS`` alone; ``many``: from ``FEWEST_ROWS`` on alone;
    ``emulated``: alone where the CPU has no instructions for the dtype."""

    library: str
    dtype: torch.dtype
    drops: bool
    few: bool = False
    many: bool = False
    emulated: bool = False

    def holds(self, x: torch.Tensor, ranks: int, drops: bool) -> bool:
        """Of ``x``, real or fake, and of the ``ranks`` of all sites together."""
        if x.dtype != self.dtype or drops != self.drops or not 0 < ranks <= (MOST_RANKS if self.few else ranks):
            return False
        if self.many and math.prod(map(size_hint, x.shape[:-1])) < FEWEST_ROWS:
            return False
        return cpu_emulates(x.dtype) if self.emulated else self.library != "pairs" or has_avx512_bf16()

    @property
    def in_cpp(self) -> str:
        """The same, of ``type``, ``drops``, ``ranks`` and ``x``: a line that returns the library if it is there."""
        conditions = [
            f"type == ScalarType::{'BFloat16' if self.dtype == torch.bfloat16 else 'Float'}",
            "drops" if self.drops else "!drops",
            *(["ranks <= MOST_RANKS"] if self.few else []),
            *(["x.numel() >= FEWEST_ROWS * width_of(x)"] if self.many else []),
            *(["EMULATES"] if self.emulated else []),
            f"(found = {self.library}.load()) != nullptr",
        ]
        return f"    if ({' && '.join(conditions)}) return found;"


RULES = (
    Rule("pairs", torch.bfloat16, drops=False, few=True),
    # The libraries go through fp32 number by number there.
    Rule("skinny", torch.bfloat16, drops=False, emulated=True),
    Rule("skinny", torch.float32, drops=False, few=True, many=True),
    Rule("skinny", torch.bfloat16, drops=True),
    Rule("skinny", torch.float32, drops=True),
)
IN_CPP = "\n".join(rule.in_cpp for rule in RULES)


def takes(library: str, x: torch.Tensor, ranks: int, drops: bool = False) -> bool:
    """Whether ``library`` takes the product of ``x``, a plain tensor."""
    # Of a subclass the memory may be elsewhere, or nowhere.
    known = type(x) is torch.Tensor and x.numel() > 0
    return known and any(rule.library == library and rule.holds(x, ranks, drops) for rule in RULES)


def stays(x: torch.Tensor, ranks: int, library: str = "") -> bool:
    """Whether compiled code for a CPU has a kernel make the product of ``x`` without dropout; one of ``library`` if
    given. Not where the CPU emulates its dtype: products that are better made in another dtype are to be seen."""
    rules = (rule for rule in RULES if not rule.emulated and library in ("", rule.library))
    return any(rule.holds(x, size_hint(ranks), False) for rule in rules)


def are_plain(*tensors: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether ``tensors``, of which some may be None, have memory of their own, on one device, and ``dtype``."""
    given = [t for t in tensors if t is not None]
    kind = dtype, given[0].device
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and (t.dtype, t.device) == kind for t in given)
