"""Calls whose backward is still to come: it reads weights that the forward has saved.

Each call that records gradients leaves a mark at the end of its graph, which is gone with the graph; the mark is taken
off when a backward runs. A second backward through a graph that was kept (``retain_graph=True``) is not known here;
torch itself raises then, because the weights have changed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch


class _Mark:
    """Hook on the last nodes of a call's graph."""

    def __init__(self) -> None:
        self.waits = True

    def __call__(self, *_: Any) -> None:
        self.waits = False


class Pending:
    """The calls of one model that may still be run backward."""

    def __init__(self) -> None:
        self._marks: weakref.WeakSet[_Mark] = weakref.WeakSet()

    def note(self, outputs: Iterable[torch.Tensor]) -> None:
        """Remember a call by its outputs that have gradients."""
        mark = None
        for node in {output.grad_fn for output in outputs if output.grad_fn is not None}:
            if mark is None:
                self._marks.add(mark := _Mark())
            node.register_hook(mark)

    def any(self) -> bool:
        """Whether a backward may still come."""
        if not self._waiting():
            return False
        gc.collect()  # graphs in a circle of objects that nobody refers to
        return self._waiting()

    def _waiting(self) -> bool:
        return any(mark.waits for mark in self._marks)
