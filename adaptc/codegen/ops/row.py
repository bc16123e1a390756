"""A row of the registry: what one op of the dialect becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir.dialect import Cost


def on_cpu(device: torch.device, *args: Any) -> bool:
    """Of a kernel that every CPU has, or an op that stays whole on each."""
    return device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute an op: faster than its body, with no larger error.

    Args:
        run: (arguments of the op) -> its results.
        takes: (arguments of the op) -> whether it takes their shapes, dtypes and strides.
        platform: (device) -> whether the device, the machine and its toolchain have it. Asked last: it may compile.
        cost: of one execution, where it is not that of the body.
    """

    run: Callable[..., Any]
    takes: Callable[..., bool]
    platform: Callable[[torch.device], bool]
    cost: Callable[..., Cost] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """What an op becomes.

    Args:
        lowering: (edit, arguments as nodes) -> nodes of its outputs: writes the op out; None: as its body is.
        kernels: the first that takes the arguments and is there runs; the body where none does.
        whole: (device, arguments with fake values) -> whether the op stays one node in compiled code, and runs there as
            outside a graph: a kernel takes it, or it would become more kernels than it has products.
        split: (edit, arguments as nodes) -> the op without the products of frozen layers, which it writes out, and the
            arguments of that.
    """

    lowering: Callable[..., tuple[fx.Node, ...]] | None = None
    kernels: tuple[Kernel, ...] = ()
    whole: Callable[..., bool] = lambda device, *args: False
    split: Callable[..., tuple[str, tuple[Any, ...]]] | None = None


def chosen(kernels: Sequence[Kernel], device: torch.device, *args: Any) -> Kernel | None:
    """The first kernel that takes ``args`` and is there on ``device``; None where none does."""
    for kernel in kernels:
        if kernel.takes(*args) and kernel.platform(device):
            return kernel
    return None
