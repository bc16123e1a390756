"""Which of several ways to compute a value is the fastest on this host: timed when first asked, then read from disk.

A table for each host (processor, threads, torch and the libraries that it was built with) is a JSON file in the
directory of Inductor's caches: question -> median seconds of each way. What was chosen there is chosen again, in every
process: of several that ask at once, one times and the others wait for it. Delete the directory to have all timed anew.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import filelock
import torch

from adaptc import torch_internals
from adaptc.codegen.cpp import build

log = logging.getLogger(__name__)

#: By how much another way must be faster than the usual one: timings are noisy, and habits cost nothing.
MARGIN = 0.05
#: Seconds that timing one question may take, and how often each way runs at most and at least.
_BUDGET, _MOST, _LEAST = 0.3, 9, 5
#: Seconds to wait for another process that times.
_PATIENCE = 60


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for ``question``, of ways whose first is the usual one.

    ``seconds``: way -> median, of those that were timed (none where only one was worth it). ``predicted``: way ->
    seconds by the roofline; ``saved``: way -> bytes kept for the backward; ``sites``: whose choice it is. Empty where
    they are not asked for.
    """

    question: str
    seconds: Mapping[str, float]
    predicted: Mapping[str, float] = dataclasses.field(default_factory=dict)
    saved: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sites: tuple[str, ...] = ()

    @property
    def usual(self) -> str:
        return next(iter(self.seconds or self.predicted))

    @property
    def chosen(self) -> str:
        if not self.seconds:
            return self.usual
        best = min(self.seconds, key=self.seconds.__getitem__)
        return best if self.seconds[best] < (1 - MARGIN) * self.seconds[self.usual] else self.usual

    @property
    def runner_up(self) -> tuple[str, float]:
        """The next best way, and how long it takes over what the chosen one does: as timed, or else as predicted."""
        known = self.seconds or self.predicted
        rest = [way for way in known if way != self.chosen]
        other = min(rest, key=known.__getitem__)
        return other, known[other] / known[self.chosen]

    def __str__(self) -> str:
        other, ratio = self.runner_up
        predicted = self.predicted.get(other, 0) / self.predicted.get(self.chosen, 1)
        if self.seconds:
            text = f"{self.chosen}, {1e3 * self.seconds[self.chosen]:.3g} ms; {other} takes {ratio:.2f} times as long"
            text += f" ({predicted:.2f} predicted)" if predicted else ""
        else:
            text = f"{self.chosen}; {other} is predicted to take {ratio:.2f} times as long"
        if self.saved:
            text += f"; keeps {self.saved[self.chosen] / 1e6:.3g} MB, {other} {self.saved[other] / 1e6:.3g} MB"
        return f"{self.question}: {text}"


def bucket(size: int) -> int:
    """The power of two that stands for ``size`` in a question."""
    return 1 << max(0, math.ceil(math.log2(max(size, 1))))


#: Way -> what computes the value once.
Ways = Mapping[str, Callable[[], object]]


def choose(question: str, make: Callable[[], Ways]) -> Choice | None:
    """The choice for ``question`` among the ways that ``make`` gives, of which the first is the usual one; None where
    nothing is to be timed."""
    seconds = measure(question, make)
    return None if seconds is None else Choice(question, seconds)


def measure(question: str, make: Callable[[], Ways]) -> Mapping[str, float] | None:
    """Median seconds of each of the ways that ``make`` gives.

    None where nothing is to be timed: torch is asked to be deterministic, so that what runs must not depend on how
    fast it was; and where a way fails.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    if (asking := _MEMORY.known_only.get()) is not None:
        return asking.answer(question)
    path, known = _path(), _MEMORY.known
    if (path, question) not in known:
        try:
            known[path, question] = Table(path).ask(question, lambda: _time_aside(make))
        except (RuntimeError, MemoryError) as error:
            log.warning("%s is computed as usual: timing it failed (%s)", question, error)
            known[path, question] = None
    return known[path, question]


class _Memory:
    """What this process has found, by file and question; None where timing failed.

    An object: plain data that a pass reads is part of its cache key, and times that it saw so far are no such thing.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Path, str], dict[str, float] | None] = {}
        #: What answers where nothing is to be timed.
        self.known_only: contextvars.ContextVar[_KnownOnly | None] = contextvars.ContextVar("known_only", default=None)


_MEMORY = _Memory()


class _KnownOnly:
    """The answers of one table, and which questions it has none for."""

    def __init__(self, table: Table) -> None:
        self.answers, self.unanswered = table.read(), []  # type: tuple[dict[str, dict[str, float]], list[str]]

    def answer(self, question: str) -> dict[str, float] | None:
        if question not in self.answers:
            self.unanswered.append(question)
        return self.answers.get(question)


@contextlib.contextmanager
def known_only(table: Table) -> Iterator[list[str]]:
    """Time nothing inside the block, and read ``table``; collects the questions that it has no answer to."""
    asking = _KnownOnly(table)
    token = _MEMORY.known_only.set(asking)
    try:
        yield asking.unanswered
    finally:
        _MEMORY.known_only.reset(token)


def _time_aside(make: Callable[[], Ways]) -> dict[str, float]:
    """Time with tensors that compute, whatever is being traced around."""
    with torch_internals.real_tensors(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _time(make())


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

    def ask(self, question: str, answer: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is known, or ``answer()``, which is known from then on. A directory that cannot be written to is only
        reported."""
        if (known := self.read().get(question)) is not None:
            return known
        with build.quiet():  # before the lock, for which other processes do not wait long
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(f"{self.path}.lock", timeout=_PATIENCE):
                    if (known := self.read().get(question)) is None:
                        known = answer()
                        self._write({**self.read(), question: known})
                    return known
            except OSError as error:  # a timeout of the lock is one
                log.warning("choices are not kept in %s: %s", self.path, error)
                return answer()

    def _write(self, choices: Mapping[str, Mapping[str, float]]) -> None:
        beside = self.path.with_suffix(".tmp")  # one writer at a time
        beside.write_text(json.dumps({"host": host(), "choices": choices}, indent=1))
        os.replace(beside, self.path)


def host() -> dict[str, str]:
    """What timings depend on."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "onednn": str(torch.backends.mkldnn.enabled),
        "precision": " ".join(map(torch_internals.product_precision, ("cpu", "cuda"))),
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
    }


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table() -> Table:
    """That of this host, as it is set up now."""
    return Table(_path())


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
