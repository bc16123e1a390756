"""One forward and backward that leave no trace, so that graphs are compiled ahead of use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call ``model`` on a keyword dict, a tuple or list of arguments, or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def run_once(model: nn.Module, run: Callable[..., Any], inputs: Any) -> None:
    """Run ``model`` forward, by ``run``, and backward where it would be trained; restores buffers and random state, and
    leaves ``.grad`` alone."""
    buffers = {name: (b.detach().clone(), b._version) for name, b in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            output = call(run, inputs)
            leaves = [t for t in tensors_of(output) if t.requires_grad]
            trained = [p for p in model.parameters() if p.requires_grad]
            if leaves and trained:
                total = torch.stack([leaf.float().sum() for leaf in leaves]).sum()
                torch.autograd.grad(total, trained, allow_unused=True)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                before, version = buffers.get(name, (buffer, buffer._version))
                # Unchanged ones are not touched: a backward that is still to come may have saved them.
                if buffer._version != version and before.shape == buffer.shape:
                    buffer.copy_(before)


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)
