"""The default tests in environments of other releases, by hand: ``python -m pytest -m long tests/releases``.

The environments lie in the folder that ADAPTC_ENVIRONMENTS names, else in ``adaptc/environments`` of the user's cache.
One takes some gigabytes (torch with what it needs); it is made once. docs/releases.md says what was run.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).parents[2]
PAIRS = [("2.14.1", "5.24.0"), ("2.14.1", "5.19.0"), ("2.13.0", "5.24.0")]
HOURS = 3600


def cache() -> pathlib.Path:
    named = os.environ.get("ADAPTC_ENVIRONMENTS")
    if named:
        return pathlib.Path(named)
    user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return user / "adaptc" / "environments"


def requirements(extras: tuple[str, ...] = ("test", "bench")) -> Iterator[str]:
    """What the project and its extras need, without the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from project["dependencies"]
    for extra in extras:
        for wanted in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"adaptc\[(\w+)\]", wanted)
            yield from requirements((own[1],)) if own else (wanted,)


def pins(torch: str) -> list[str]:
    """The versions that are tested together, but for those that an environment changes."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    free = ("#", "torch==", "triton==", "transformers==")
    return [f"torch=={torch}", *(line for line in lines if line and not line.startswith(free))]


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def made(folder: pathlib.Path, make) -> pathlib.Path:
    """``folder``, made by ``make`` where no run has finished making it; a broken one is made anew."""
    done = folder / "made"
    if not done.exists():
        run("rm", "-rf", folder)
        folder.mkdir(parents=True)
        make(folder)
        done.touch()
    return folder


def environment(torch: str) -> pathlib.Path:
    """The Python of an environment with this torch and everything that the tests need."""

    def make(folder):
        run(sys.executable, "-m", "venv", folder / "venv")
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins(torch)))
        run(folder / "venv/bin/python", "-m", "pip", "install", "-q", "-c", constraints, *requirements())

    return made(cache() / f"torch-{torch}", make) / "venv/bin/python"


def overlay(python: pathlib.Path, transformers: str) -> pathlib.Path:
    """A folder with this transformers alone, which goes before an environment's own."""

    def make(folder):
        wanted = f"transformers=={transformers}"
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "packages", wanted)

    return made(cache() / f"transformers-{transformers}", make) / "packages"


def test_an_environments_needs_are_the_projects():
    wanted = list(requirements())
    names = {re.split(r"[\[<>=;~! ]", line)[0] for line in wanted}
    assert {"torch", "safetensors", "peft", "trl", "pytest", "hypothesis", "scikit-learn", "psutil"} <= names
    assert not any(name.startswith("adaptc") for name in names)
    kept = pins("2.14.1")
    assert "torch==2.14.1" in kept and not any(line.startswith(("transformers", "triton")) for line in kept)
    assert any(line.startswith("peft==") for line in kept)


@pytest.mark.long
@pytest.mark.timeout(12 * HOURS)
@pytest.mark.parametrize("torch, transformers", PAIRS)
def test_the_default_tests_pass(torch, transformers):
    python = environment(torch)
    path = os.pathsep.join([str(overlay(python, transformers)), str(ROOT)])
    found = {**os.environ, "PYTHONPATH": path}
    code = "import torch, transformers; print(torch.__version__.partition('+')[0], transformers.__version__)"
    said = subprocess.run([str(python), "-c", code], env=found, capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.split() == [torch, transformers]
    chosen = "not slow and not long and not gpu"
    done = subprocess.run(
        [str(python), "-m", "pytest", "-n", "2", "-m", chosen, "--ignore", str(pathlib.Path(__file__).parent)],
        env=found, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=10 * HOURS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
