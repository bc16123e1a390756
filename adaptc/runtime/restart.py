"""What a call leaves behind besides its result, for a call that begins anew: random numbers drawn, and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Elements of the largest buffer that is copied: running statistics are of some channels, and what is of the size of a
#: weight is one.
LARGEST = 1 << 20


class Before:
    """The generators and the buffers of ``model`` as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
        self._devices = [(device, _generator(device, "get_rng_state")()) for device in devices]
        self._buffers = [(b, b.detach().clone()) for b in model.buffers() if _is_plain(b) and b.numel() <= LARGEST]

    def restore(self) -> None:
        """Make them what they were."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _generator(device, "set_rng_state")(state)
        with torch.no_grad():
            for buffer, values in self._buffers:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _is_plain(buffer: torch.Tensor) -> bool:
    """Whether its values can be read and written: not those of a subclass, which may be elsewhere."""
    dense = type(buffer) is torch.Tensor and buffer.layout is torch.strided and not buffer.is_nested
    return dense and not (buffer.is_meta or buffer.is_inference())


def _generator(device: torch.device, name: str) -> Any:
    """A function for the generator of ``device``; that of Apple's GPU is the only one of its kind."""
    function = getattr(torch.get_device_module(device), name)
    if device.type == "mps":
        return function
    return lambda *state: function(*state, device)
