"""The one harness: paired, interleaved timing and the statistics of paired ratios."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

#: How the intervals below are made; goes into every result file.
INTERVAL_METHOD = (
    "distribution-free interval of the median from order statistics (inverted sign test) of the per-round "
    "paired ratios; 'coverage' is the exact one, and below 0.95 the interval is the whole range"
)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A sample median with the order statistics around it and their exact coverage."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], coverage: float = 0.95) -> Interval:
    """The narrowest symmetric order-statistic interval of the median that has at least ``coverage``.

    The interval [x_(k), x_(n+1-k)] covers the median with probability 1 - 2 P(Binomial(n, 1/2) < k),
    whatever the distribution. Fewer than 6 values cannot reach 0.95: the range is returned, with the
    coverage that it has.
    """
    if not values:
        raise ValueError("the median of no values is not defined")
    ordered = sorted(values)
    n = len(ordered)
    rank, reached = 1, _coverage(n, 1)
    while rank + 1 <= n + 1 - (rank + 1) and _coverage(n, rank + 1) >= coverage:
        rank, reached = rank + 1, _coverage(n, rank + 1)
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank], reached)


def _coverage(n: int, rank: int) -> float:
    outside: int = 2 * sum(math.comb(n, i) for i in range(rank))
    return max(0.0, 1 - outside / float(2**n))


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median and interval of the per-round ratios of two contenders timed in the same rounds."""
    return median_interval([a / b for a, b in zip(numerator, denominator, strict=True)])


def visiting_orders(count: int, rounds: int, seed: int) -> list[list[int]]:
    """In which order each round visits ``count`` contenders: Williams designs, their rows shuffled.

    Over one design (``count`` rounds, or twice as many when ``count`` is odd) every contender is visited
    equally often at every place and directly after every other one, so that neither the place in a round
    nor what the predecessor leaves in the caches favours anyone.
    """
    zigzag = [(k + 1) // 2 if k % 2 else (count - k // 2) % count for k in range(count)]
    design = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    if count % 2:
        design += [row[::-1] for row in design]
    rng = random.Random(seed)
    orders: list[list[int]] = []
    while len(orders) < rounds:
        orders += rng.sample(design, len(design))
    return orders[:rounds]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    seed: int,
    after: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; entry i of every list belongs to round i.

    The garbage collector runs between rounds only. ``after`` is called with a contender's name outside the
    timed part, after each of its steps.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for order in visiting_orders(len(names), rounds, seed):
            gc.collect()
            for index in order:
                name = names[index]
                times[name].append(seconds_of(steps[name], device))
                after(name)
    finally:
        if was_enabled:
            gc.enable()
    return times
