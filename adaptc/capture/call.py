"""What is known of the call in progress, on this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from adaptc.capture.recompute import in_reentrant_checkpoint


class _CallState(threading.local):
    """What one call of the model needs; set by the prologue, read where hooks run outside a graph."""

    #: ``id`` of the site-id tensors whose hooks ran outside a graph, while somebody collects them.
    eager: set[int] | None = None
    #: How many prologues are active on this thread.
    depth: int = 0
    #: Whether blocks in the call in progress are not captured by themselves: it is captured whole, or is to be.
    whole: bool = False
    #: Of a call with gradients: which site-id tensors' adapters ran with gradients on, and which with them off.
    recorded: set[int] | None = None
    stopped: set[int] | None = None

    #: What corrects outputs in the call in progress, by the number of a slot (``capture.slots``).
    slots: Any = None

    def __init__(self) -> None:
        # Set on the object: Dynamo does not guard on what only the class has.
        #: In a batch of several adapters: int64 (B,), or (B, S) of spans: the number of each row's adapter.
        self.rows: torch.Tensor | None = None
        #: Changes with the batch: which adapter is whose.
        self.assignment: int | None = None
        #: Gets (adapters of a module, whether they act inside of it, the tensors that they would read or correct); they
        #: do nothing then.
        self.probe: Callable[[Any, bool, Sequence[Any]], None] | None = None
        #: Which bank serves the call, by its name: graphs have slots, and not the adapters themselves. "": none does.
        self.in_slots = ""


CALL = _CallState()


def note_mode(site_ids: Iterable[int], *, recorded: bool = True) -> None:
    """Tell who collects it whether adapters (by ``id`` of their site-id tensors) run with gradients on; ``recorded``
    False: they do not, whatever the mode is."""
    collected = CALL.recorded if recorded and torch.is_grad_enabled() else CALL.stopped
    if collected is not None and (torch.is_grad_enabled() or not in_reentrant_checkpoint()):
        collected.update(site_ids)
