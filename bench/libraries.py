"""How fast the two libraries for products in fp32 are, in the process that timed the contenders.

torch calls MKL, adaptc may call oneDNN. What one wins over the other differs between machines, and between two
processes on one machine: it is part of what a step's ratio to the floor says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bench.harness import median_interval, ratio_interval, seconds_of
from bench.settings import Case, Settings
from bench.torch_internals import has_both_libraries, onednn_product

#: What the numbers are; goes into a result file that has them.
LIBRARIES_METHOD = (
    "the products of the frozen base's step (x W^T and g W of every linear layer) alone, all of them by MKL and all of "
    "them by oneDNN, in eight rounds of alternating order, in the process of the contenders and after them; MKL writes "
    "to memory that is there, oneDNN to memory of its own, as compiled code calls them"
)
#: Even: either library is the first of a round as often as the other.
ROUNDS = 8


def libraries_row(settings: Settings, case: Case, base: nn.Module, device: torch.device) -> dict[str, Any] | None:
    """Seconds that the step's products take in each library, and the ratio; None where torch does not choose between
    them: another dtype or device, or a build that has one of them only."""
    if case.dtype != "fp32" or device.type != "cpu" or not has_both_libraries():
        return None
    products = list(_products(base, settings.batch * settings.tokens))
    rounds: dict[str, list[float]] = {"mkl": [], "onednn": []}
    for turn in range(-1, ROUNDS):
        for name in list(rounds)[:: 1 if turn % 2 else -1]:
            taken = sum(seconds_of(ways[name], device) for ways in products)
            if turn >= 0:  # the first round warms up
                rounds[name].append(taken)
    return {
        **{name: dataclasses.asdict(median_interval(seconds)) for name, seconds in rounds.items()},
        "onednn_over_mkl": dataclasses.asdict(ratio_interval(rounds["onednn"], rounds["mkl"])),
    }


def _products(base: nn.Module, rows: int) -> Iterator[dict[str, Callable[[], object]]]:
    memory: dict[int, torch.Tensor] = {}  # one for all operands of a width
    for layer in base.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            for width in weight.shape:
                memory.setdefault(width, torch.ones(2, rows, width))
            for right in (weight.t(), weight):
                yield _ways(memory[right.shape[0]][0], right, memory[right.shape[1]][1])


def _ways(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> dict[str, Callable[[], object]]:
    return {"mkl": lambda: torch.mm(left, right, out=into), "onednn": lambda: onednn_product(left, right)}
