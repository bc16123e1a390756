"""Cold compile: from the base model to the end of its first step, in a new process with empty caches.

``python -m bench.cold`` is the measured process: it reads its task as JSON from the standard input and writes
its answer to the file named there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.harness import visiting_orders
from bench.settings import Case, Settings

#: What the numbers are; goes into every result file.
COLD_METHOD = (
    "wall-clock seconds from the base model in memory to the end of the first step (adapting, compiling, "
    "running), less the median of the next three steps; each time a new process with empty caches (Inductor, "
    "Triton, temporary files, the user's cache folder); every process has imported the same packages before"
)
#: Where compilers keep what they made: all of them point into the fresh folder.
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR", "XDG_CACHE_HOME")
STEADY_STEPS = 3


def measure_cold(settings: Settings, case: Case, names: Sequence[str]) -> dict[str, list[float]]:
    """Compile seconds of each contender in each of ``settings.cold`` rounds, in interleaved order."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for order in visiting_orders(len(names), settings.cold, settings.seed):
        for index in order:
            times[names[index]].append(_compile_once(settings, case, names[index]))
    return times


def fresh_environment(folder: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """``inherited`` with every cache moved into ``folder``, which is empty: the same state for everyone."""
    environment = dict(inherited)
    for variable in CACHE_VARIABLES:
        place = folder / variable.lower()
        place.mkdir()
        environment[variable] = str(place)
    return environment


def _compile_once(settings: Settings, case: Case, name: str) -> float:
    with tempfile.TemporaryDirectory(prefix="bench-cold-") as temporary:
        folder = Path(temporary)
        answer = folder / "answer.json"
        task = {
            "settings": dataclasses.asdict(settings),
            "case": dataclasses.asdict(case),
            "contender": name,
            "answer": str(answer),
        }
        finished = subprocess.run(
            [sys.executable, "-m", "bench.cold"],
            input=json.dumps(task),
            env=fresh_environment(folder, os.environ),
            cwd=Path(__file__).resolve().parent.parent,
            text=True,
            capture_output=True,
            check=False,
        )
        if finished.returncode or not answer.exists():
            end = "\n".join(finished.stderr.splitlines()[-15:])
            raise BenchError(f"cold compile of {name} ({case}) ended with {finished.returncode}:\n{end}")
        result: float = json.loads(answer.read_text())["seconds"]
        return result


def main() -> None:
    """Compile and run one contender; the task comes from the standard input."""
    task = json.load(sys.stdin)
    settings, case = Settings(**task["settings"]), Case(**task["case"])
    seconds = compile_seconds(settings, case, task["contender"])
    Path(task["answer"]).write_text(json.dumps({"seconds": seconds}))


def compile_seconds(settings: Settings, case: Case, name: str) -> float:
    """Seconds that ``name`` needs before its first step is done, beyond what a step takes."""
    import peft  # noqa: F401
    import torch

    import adaptc
    from adaptc.codegen.cpp import build
    from bench import contenders
    from bench.harness import seconds_of, synchronize

    # Everyone imports what anyone needs, so that nobody pays for an import that another had before the clock.
    _ = adaptc.compile, adaptc.Plan, adaptc.LoRA
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    base = contenders.build_base(settings, case)
    synchronize(device)
    start = time.perf_counter()
    contender = contenders.BUILDERS[name](base, settings, case)
    contender.step()
    synchronize(device)
    first = time.perf_counter() - start
    with build.quiet():  # steps are not timed beside what may still be compiled
        steady = statistics.median(seconds_of(contender.step, device) for _ in range(STEADY_STEPS))
    return first - steady


if __name__ == "__main__":
    main()
