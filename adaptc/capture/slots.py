"""Slots: ops of captured graphs that do, when they run, what the adapters of a module do by then.

A graph with slots knows neither which adapters there are nor their kinds and ranks: one graph serves them all. A slot
is told from another by a tensor, because equal layers share graphs. Only calls without gradients have slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from adaptc.capture.call import CALL
from adaptc.torch_internals import OpOverload

_LIBRARY = torch.library.Library("adaptc_slots", "DEF")  # type: ignore[no-untyped-call]
#: What a slot does is decided when it runs: a CUDA graph would replay what it did once.
_TAGS = [tag for name in ("pt2_compliant_tag", "cudagraph_unsafe") if (tag := getattr(torch.Tag, name, None))]


class Slots(Protocol):
    """What the slots of one model do, by their numbers."""

    def correct(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Write into ``y`` (..., N), the output of a module for ``x`` (..., K), what its adapters make of it."""

    def change_input(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The input that a module gets in the place of ``x``; may be ``x`` itself."""


def _slots() -> Slots:
    slots: Slots | None = CALL.slots
    if slots is None:
        raise RuntimeError("adaptc: a graph with slots runs outside of a call of its model")
    return slots


def _correct(number: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    _slots().correct(int(number), x, y)


def _change_input(number: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    changed = _slots().change_input(int(number), x)
    # What an op returns is none of its inputs.
    return x.clone(memory_format=torch.contiguous_format) if changed is x else changed.contiguous()


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    torch.library.define(f"adaptc_slots::{name}", schema, lib=_LIBRARY, tags=_TAGS)
    torch.library.impl(f"adaptc_slots::{name}", "CompositeExplicitAutograd", run, lib=_LIBRARY)
    torch.library.register_fake(f"adaptc_slots::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.adaptc_slots, name).default  # type: ignore[no-any-return]


#: (number (1,) int64 on the CPU, x, y): y changes in place.
CORRECT = _define("correct", "(Tensor number, Tensor x, Tensor(a!) y) -> ()", _correct, lambda *_: None)
#: (number, x) -> x'.
CHANGE_INPUT = _define(
    "change_input", "(Tensor number, Tensor x) -> Tensor", _change_input,
    lambda number, x: torch.empty_like(x, memory_format=torch.contiguous_format),
)  # fmt: skip
