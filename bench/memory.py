"""Bytes of one step: the peak, and what lives across the cut between forward and backward.

Both count what is allocated during the step and come on top of what was there before it (model, adapter and
inputs), so parameters and inputs are never in them, and two views of one storage count once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.contenders import Contender

#: What the two numbers are; goes into every result file.
MEMORY_METHOD = (
    "bytes allocated during one step on top of what was there before it; peak: their maximum over the step, "
    "gradients included; saved: those alive after the forward while only the loss is held. CPU: allocator "
    "events of torch.profiler (scratch memory that a library takes from malloc is not seen); CUDA: "
    "torch.cuda.max_memory_allocated and memory_allocated (rounded to the allocator's blocks)"
)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes above the starting point: the maximum during a call, and what was left at its end."""

    peak: int
    live: int


def replay(events: Iterable[tuple[int, int]]) -> Usage:
    """Peak and rest of a list of (address, bytes) events, frees having negative bytes.

    The free of an address that was not allocated in the list belongs to memory that was there before, and
    does not count.
    """
    held: dict[int, int] = {}
    total = peak = 0
    for address, size in events:
        if size > 0:
            # An address that is given out again was freed unseen (by a library's own free).
            total += size - held.get(address, 0)
            held[address] = size
            peak = max(peak, total)
        else:
            total -= held.pop(address, 0)
    return Usage(peak, total)


def usage_of(call: Callable[[], object], device: torch.device) -> Usage:
    """Bytes that ``call`` takes; its result is kept alive until the count of what is left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        del result
        return Usage(torch.cuda.max_memory_allocated(device) - before, live)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    del result
    return replay(_memory_events(profiler))


def _memory_events(profiler: torch.profiler.profile) -> Iterator[tuple[int, int]]:
    """(address, bytes) of every CPU allocation and free, in the order of time, from the exported trace."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(memory, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        if event["args"]["Device Type"] == 0:
            yield event["args"]["Addr"], event["args"]["Bytes"]


def step_memory(contender: Contender, device: torch.device) -> tuple[int, int]:
    """(peak bytes of one step, bytes saved for the backward). The contender must be warm."""
    contender.clear()
    peak = usage_of(contender.step, device).peak
    saved = usage_of(contender.forward, device).live
    return peak, saved


def hooked_saved_bytes(contender: Contender, model: nn.Module) -> int:
    """Bytes of the storages that autograd saves in an eager forward, parameters and inputs excluded.

    A second instrument for the eager contender, for which ``torch.autograd.graph.saved_tensors_hooks`` sees
    everything. Under torch.compile the hooks would change what is captured.
    """
    known = [*model.parameters(), *model.buffers(), contender.embeds, contender.labels]
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contender.forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total
