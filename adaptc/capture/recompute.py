"""Checkpoint recomputation outside a graph: it must meet the adapters that the forward met.

A checkpointed block that is not part of a captured graph runs again in the backward, and reads which adapters are
live then. After a switch in between it would recompute another function, and every gradient of the block would be
wrong. torch compares the shapes of what the two runs save: so each run saves an empty tensor whose shape says which
adapters acted, and another one raises ``CheckpointError``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from adaptc.torch_internals import saves_through_hooks

#: Shapes are at most this long, so that no product of sizes overflows.
_LONGEST = 2**31


class _Mark(torch.autograd.Function):
    """Identity that saves an empty tensor of the shape (0, token)."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, token: int) -> torch.Tensor:
        ctx.save_for_backward(value.new_empty((0, token)))
        # A copy: a view made here could not be changed in place by what follows.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        _ = ctx.saved_tensors
        return grad, None


def in_reentrant_checkpoint() -> bool:
    """Whether this is the forward of a re-entrant checkpoint: without gradients, and computed again with them."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def mark(outputs: Any, adapters: Iterable[int]) -> Any:
    """``outputs`` (a tensor, or a sequence of which the first tensor with a gradient counts), made to remember under
    checkpointing which ``adapters`` (numbers that name them) acted on it."""
    if not torch.is_grad_enabled() or not saves_through_hooks():
        return outputs
    token = 1 + hash(tuple(adapters)) % _LONGEST
    if isinstance(outputs, torch.Tensor):
        return _Mark.apply(outputs, token) if outputs.requires_grad else outputs  # type: ignore[no-untyped-call]
    if type(outputs) not in (tuple, list):
        return outputs
    marked = list(outputs)
    for i, value in enumerate(marked):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            marked[i] = _Mark.apply(value, token)  # type: ignore[no-untyped-call]
            break
    return type(outputs)(marked)
