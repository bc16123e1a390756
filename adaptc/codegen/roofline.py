"""How long a computation takes by the roofline: the larger of its arithmetic and its traffic, call by call.

    T = sum over the calls of  max(operations / rate, bytes / bandwidth) + overhead

The three constants are measured once for each host, device and dtype, and kept with the choices that are made by
timing. Good for ranking: caches make small operands faster than the bandwidth says, skinny products are slower than the
rate says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from adaptc.codegen import choices
from adaptc.codegen.cost import call_costs

#: Rows and columns of the product, and elements of the copy, that are timed: past the caches.
_SIDE, _LONG = 1024, 1 << 24


class Rates(NamedTuple):
    """Operations a second of a large product, bytes a second of a copy, seconds of a call that does nothing much."""

    operations: float
    bandwidth: float
    overhead: float

    def seconds(self, function: Callable[..., object], *args: Any) -> float:
        """The prediction for ``function(*args)``; of the tensors only shapes and dtypes are read."""
        costs = call_costs(function, args, {})
        return sum(
            max(one.flops / self.operations, (one.read + one.written) / self.bandwidth) + self.overhead for one in costs
        )


def rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Those of this host; None where nothing is to be timed, and on devices whose work cannot be waited for here."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return None

    def make() -> choices.Ways:
        ones = functools.partial(torch.ones, device=device, dtype=dtype)
        square, long, small = ones(_SIDE, _SIDE), ones(_LONG), ones(8, 8)
        into, copy, little = torch.empty_like(square), torch.empty_like(long), torch.empty_like(small)
        return {
            "product": finished(lambda: torch.mm(square, square, out=into), device),
            "copy": finished(lambda: copy.copy_(long), device),
            "small": finished(lambda: torch.mm(small, small, out=little), device),
        }

    found = choices.measure(f"rates{on(device)}, {str(dtype).removeprefix('torch.')}", make)
    if found is None:
        return None
    return Rates(2 * _SIDE**3 / found["product"], 2 * _LONG * dtype.itemsize / found["copy"], found["small"])


def on(device: torch.device) -> str:
    """What a question says of the device; nothing for the CPU, which its table is of."""
    if device.type == "cpu":
        return ""
    return f" on {torch.get_device_module(device).get_device_name(device)}"


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run``, over when the device has done it."""
    if device.type == "cpu":
        return run

    def wait() -> None:
        run()
        torch.get_device_module(device).synchronize(device)

    return wait
