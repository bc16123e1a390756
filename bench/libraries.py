"""How fast the two libraries for products in fp32 are, in the process that timed the contenders.

torch calls MKL, adaptc may call oneDNN. What one wins over the other differs between machines, and between two
processes on one machine: it is part of what a step's ratio to the floor says.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bench.harness import median_interval, ratio_interval, seconds_of
from bench.settings import Case, Settings
from bench.torch_internals import has_both_libraries, onednn_product

#: What the numbers are; goes into every result file.
LIBRARIES_METHOD = (
    "the products of the frozen base's step (x W^T and g W of every linear layer), each made by MKL and by oneDNN in "
    "turn, in the process of the contenders and after them; seconds of all products, summed in each of as many rounds "
    "as there were for the contenders, nine at most"
)
MOST_ROUNDS = 9


def libraries_row(settings: Settings, case: Case, base: nn.Module, device: torch.device) -> dict[str, Any] | None:
    """Seconds that the step's products take in each library, and the ratio; None where torch does not choose between
    them: another dtype or device, or a build that has one of them only."""
    if case.dtype != "fp32" or device.type != "cpu" or not has_both_libraries():
        return None
    products = list(_products(base, settings.batch * settings.tokens))
    rounds: dict[str, list[float]] = {"mkl": [], "onednn": []}
    for turn in range(min(settings.rounds, MOST_ROUNDS) + 1):
        order = list(rounds) if turn % 2 else list(rounds)[::-1]
        taken = dict.fromkeys(rounds, 0.0)
        for ways, name in itertools.product(products, order):
            taken[name] += seconds_of(ways[name], device)
        for name in rounds if turn else ():  # the first warms up
            rounds[name].append(taken[name])
    return {
        **{name: dataclasses.asdict(median_interval(seconds)) for name, seconds in rounds.items()},
        "onednn_over_mkl": dataclasses.asdict(ratio_interval(rounds["onednn"], rounds["mkl"])),
    }


def _products(base: nn.Module, rows: int) -> Iterator[dict[str, Callable[[], object]]]:
    for layer in base.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            yield _ways(rows, weight.t())
            yield _ways(rows, weight)


def _ways(rows: int, right: torch.Tensor) -> dict[str, Callable[[], object]]:
    left, into = torch.ones(rows, right.shape[0]), torch.empty(rows, right.shape[1])
    return {"mkl": lambda: torch.mm(left, right, out=into), "onednn": lambda: onednn_product(left, right)}
