"""Which of several ways to compute a value is the fastest on this host: timed when first asked, then read from disk.

A table for each host (processor, threads, torch and the libraries that it was built with) is a JSON file beside
Inductor's cache: question -> median seconds of each way. What was chosen there is chosen again, in every process;
delete the file to have it timed anew. Several processes may write: each adds to what it finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from adaptc.codegen import torch_internals

log = logging.getLogger(__name__)

#: By how much another way must be faster than the usual one: timings are noisy, and habits cost nothing.
MARGIN = 0.05
#: Seconds that timing one question may take, and how often each way runs at most and at least.
_BUDGET, _MOST, _LEAST = 0.3, 9, 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """``question`` as text; ``seconds``: way -> median; the first one is the usual."""

    question: str
    seconds: Mapping[str, float]

    @property
    def usual(self) -> str:
        return next(iter(self.seconds))

    @property
    def chosen(self) -> str:
        best = min(self.seconds, key=self.seconds.__getitem__)
        return best if self.seconds[best] < (1 - MARGIN) * self.seconds[self.usual] else self.usual

    @property
    def runner_up(self) -> tuple[str, float]:
        """The next best way, and how long it takes over what the chosen one does."""
        rest = [way for way in self.seconds if way != self.chosen]
        other = min(rest, key=self.seconds.__getitem__)
        return other, self.seconds[other] / self.seconds[self.chosen]

    def __str__(self) -> str:
        other, ratio = self.runner_up
        milliseconds = 1e3 * self.seconds[self.chosen]
        return f"{self.question}: {self.chosen}, {milliseconds:.3g} ms; {other} takes {ratio:.2f} times as long"


def bucket(size: int) -> int:
    """The power of two that stands for ``size`` in a question."""
    return 1 << max(0, math.ceil(math.log2(max(size, 1))))


#: Way -> what computes the value once.
Ways = Mapping[str, Callable[[], object]]


def choose(question: str, make: Callable[[], Ways]) -> Choice | None:
    """The choice for ``question`` among the ways that ``make`` gives, of which the first is the usual one.

    None where nothing is to be timed: torch is asked to be deterministic, so that what runs must not depend on how
    fast it was.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    table = Table(_path())
    seconds = table.read().get(question)
    if seconds is None:
        with torch_internals.real_tensors(), torch.no_grad():
            seconds = _time(make())
        table.add(question, seconds)
    return Choice(question, seconds)


class Table:
    """The file of one host: question -> way -> seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, float]]:
        """What is known; nothing where the file is missing or is not one of these."""
        try:
            choices = json.loads(self.path.read_text())["choices"]
            return {
                str(question): {str(way): float(value) for way, value in ways.items()}
                for question, ways in choices.items() if len(ways) > 1
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("choices in %s cannot be read, and are timed again: %s", self.path, error)
            return {}

    def add(self, question: str, seconds: Mapping[str, float]) -> None:
        """Remember the answer; a directory that cannot be written to is only reported."""
        content = {"host": host(), "choices": {**self.read(), question: dict(seconds)}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                file.write(json.dumps(content, indent=1))
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("the choice for %s is not kept: %s", question, error)


def host() -> dict[str, str]:
    """What timings depend on."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
    }


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _path() -> Path:
    key = hashlib.sha256(json.dumps(host(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(torch_internals.cache_dir()) / "adaptc" / f"choices-{key}.json"


def _time(ways: Ways) -> dict[str, float]:
    """Median seconds of each, run in turns after one run that is not counted."""
    for run in ways.values():
        run()
    found: dict[str, list[float]] = {way: [] for way in ways}
    began = time.perf_counter()
    for done in range(_MOST):
        if done >= _LEAST and time.perf_counter() - began > _BUDGET:
            break
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            found[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in found.items()}
