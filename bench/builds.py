"""Two builds of adaptc in one run: each in a process of its own, which take their steps in turn.

``python bench/builds.py`` is such a process, started by :class:`Worker`: it reads tasks as JSON lines from the standard
input and answers each by one JSON line. What it imports as ``bench`` is this folder, and as ``adaptc`` the build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    # Python puts the folder of a script first, where `bench` is not a package.
    sys.path.pop(0)

from bench.errors import BenchError
from bench.harness import visiting_orders
from bench.settings import Case, Settings

ROOT = Path(__file__).resolve().parent.parent
#: What the numbers are; goes into every result file.
BUILDS_METHOD = (
    "each build of adaptc lives in a process of its own, which holds one contender; in each round both take one step, "
    "one after the other and each as often first, while the other process waits"
)
#: Threads of a process that waits spin for some milliseconds after its step.
PAUSE_S = 0.05


@dataclasses.dataclass(frozen=True)
class Build:
    """A folder that holds a package ``adaptc``, and what a result file calls it (never a path)."""

    folder: Path
    name: str


@contextlib.contextmanager
def opened(source: Path | None) -> Iterator[Build]:
    """The build at ``source``: a checkout, a wheel, or None for the checkout that this file is in.

    Raises:
        BenchError: there is no package ``adaptc`` in it.
    """
    source = ROOT if source is None else source
    with tempfile.TemporaryDirectory(prefix="bench-build-") as temporary:
        folder = Path(temporary)
        if source.suffix == ".whl" and source.is_file():
            with zipfile.ZipFile(source) as wheel:
                wheel.extractall(folder)
        elif (source / "adaptc" / "__init__.py").is_file():
            (folder / "adaptc").symlink_to((source / "adaptc").resolve())
        if not (folder / "adaptc" / "__init__.py").is_file():
            raise BenchError(f"--against {source}: neither a wheel of adaptc nor a folder with the package adaptc")
        (folder / "bench").symlink_to(ROOT / "bench")
        yield Build(folder, _name(source, folder / "adaptc"))


def _name(source: Path, package: Path) -> str:
    """File name of a wheel or commit of a checkout, and a digest of the package's sources."""
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    parts = [source.name] if source.is_file() else _commit(source)
    return " ".join([*parts, f"(sources {digest.hexdigest()[:12]})"])


def _commit(folder: Path) -> list[str]:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=-changed"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return [found.stdout.strip()]
    return []


class Worker:
    """The process of one build.

    Args:
        task: a key of ``TASKS``; it and its arguments say what a step is.
    """

    def __init__(self, build: Build, task: str, **arguments: Any) -> None:
        self.build = build
        environment = {**os.environ, "PYTHONPATH": str(build.folder)}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "builds.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=build.folder,
        )  # fmt: skip
        try:
            self.facts = self._ask({"task": task, "arguments": arguments})
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        """Take one step; its seconds, of one call where a step is several."""
        return float(self._ask({"task": "step"})["seconds"]) / int(self.facts.get("calls", 1))

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: its answer is missing, too
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the process of {self.build.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.build.name}: {answer['error']}")
        return answer


def in_turn(
    workers: Sequence[Worker], *, rounds: int, seed: int, pause: float = PAUSE_S
) -> list[list[float]]:
    """Seconds of a step of each worker in each round; entry i of every list belongs to round i."""
    times: list[list[float]] = [[] for _ in workers]
    for order in visiting_orders(len(workers), rounds, seed):
        for index in order:
            time.sleep(pause)
            times[index].append(workers[index].step())
    return times


def _train(settings: dict[str, Any], case: dict[str, Any], contender: str) -> tuple[Callable[[], object], Any, Any]:
    """One training step of one contender of the table ``train``, compared with PEFT first."""
    import torch

    from bench.agreement import Agreement
    from bench.contenders import BUILDERS, build_base
    from bench.machine import keep_freed_memory

    read, drawn = Settings(**settings), Case(**case)
    if read.threads:
        torch.set_num_threads(read.threads)
    keep_freed_memory()
    base = build_base(read, drawn)
    agreement = Agreement(base, read, drawn)
    built = BUILDERS[contender](base, read, drawn)
    facts = {"agreement": agreement.check(built)}
    for _ in range(read.warmup):
        built.step()
    return built.step, torch.device(read.device), facts


def _overhead(**arguments: Any) -> tuple[Callable[[], object], Any, Any]:
    from bench import overhead

    return overhead.prepare(**arguments)


TASKS: dict[str, Callable[..., tuple[Callable[[], object], Any, Any]]] = {"train": _train, "overhead": _overhead}


def main() -> None:
    """Answer tasks until the standard input ends."""
    # What libraries print is not an answer.
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    task = json.loads(sys.stdin.readline())
    try:
        step, device, facts = TASKS[task["task"]](**task["arguments"])
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
    answer(facts)
    _take_steps(step, device, answer)


def _take_steps(step: Callable[[], object], device: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    import gc

    from adaptc.codegen.cpp import build
    from bench.harness import seconds_of

    gc.disable()
    with build.quiet():  # not beside what may still be compiled
        for _ in sys.stdin:
            gc.collect()
            answer({"seconds": seconds_of(step, device)})


if __name__ == "__main__":
    main()
