"""Two builds of adaptc in one run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import against, builds
from bench.__main__ import main
from bench.errors import BenchError
from bench.settings import Case, Settings

TINY = ["--layers", "1", "--hidden", "32", "--tokens", "8", "--rounds", "6"]


#: Appended to a copy of the package: what a call of a compiled model does besides.
PATCH = """

def compile(*args, **kwargs):
    import time
    from adaptc.api import compile
    model = compile(*args, **kwargs)
    call = model._compiled_call_impl
    def patched(*args, **kwargs):
        output = call(*args, **kwargs)
        {change}
        return output
    model._compiled_call_impl = patched
    return model
"""


def changed_build(folder: Path, change: str) -> Path:
    shutil.copytree(builds.ROOT / "adaptc", folder / "adaptc", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "adaptc" / "__init__.py").open("a") as source:
        source.write(PATCH.format(change=change))
    return folder


@pytest.fixture(scope="module")
def slower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which every call of a model sleeps for 20 ms."""
    return changed_build(tmp_path_factory.mktemp("slower"), "time.sleep(0.02)")


def wheel_of(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for file in (folder / "adaptc").rglob("*"):
            wheel.write(file, file.relative_to(folder))
    return path


def test_a_build_is_a_checkout_or_a_wheel_and_both_import_this_bench(slower: Path, tmp_path: Path) -> None:
    wheel = wheel_of(slower, tmp_path / "adaptc-9-py3-none-any.whl")
    program = "import adaptc, bench.builds as b, pathlib; print(pathlib.Path(adaptc.__file__).resolve(), b.ROOT)"
    for source in (slower, wheel):
        with builds.opened(source) as build:
            found = subprocess.run(
                [sys.executable, "-c", program], cwd=build.folder, env={"PYTHONPATH": str(build.folder)},
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            expected = slower if source == slower else build.folder
            assert found == [str(expected / "adaptc" / "__init__.py"), str(builds.ROOT)]


def test_a_name_tells_builds_apart_and_names_no_path(slower: Path, tmp_path: Path) -> None:
    wheel = wheel_of(slower, tmp_path / "adaptc-9-py3-none-any.whl")
    with builds.opened(None) as ours, builds.opened(slower) as other, builds.opened(wheel) as packed:
        names = [ours.name, other.name, packed.name]
    digests = [name.rpartition("(sources ")[2] for name in names]
    assert digests[0] != digests[1] == digests[2]
    assert not any("/" in name for name in names)
    assert names[2].startswith("adaptc-9-py3-none-any.whl")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["train", "--against", "{folder}"], "neither a wheel of adaptc nor a folder with the package adaptc"),
        (["overhead", "--against", "{folder}"], "neither a wheel of adaptc nor a folder with the package adaptc"),
        (["train", "--against", "{root}", "--contenders", "floor,adaptc"], "not ['floor']"),
    ],
)
def test_what_is_no_build_or_not_ours_is_refused(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag.format(folder=tmp_path, root=builds.ROOT) for flag in flags] + ["--out", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_builds_take_their_steps_in_turn_and_each_as_often_first() -> None:
    seen: list[int] = []

    class Fake:
        def __init__(self, number: int) -> None:
            self.number = number

        def step(self) -> float:
            seen.append(self.number)
            return self.number + len(seen) / 100

    times = builds.in_turn([Fake(0), Fake(1)], rounds=4, seed=0, pause=0)  # type: ignore[list-item]
    rounds = [seen[i : i + 2] for i in range(0, 8, 2)]
    assert sorted(map(tuple, rounds)) == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert [len(t) for t in times] == [4, 4]
    assert all(int(t) == number for number, mine in enumerate(times) for t in mine)


@pytest.mark.slow
def test_a_slower_build_is_told_by_its_python_per_call(slower: Path) -> None:
    settings = Settings(layers=1, hidden=32, tokens=8, head_dim=32)
    with builds.opened(None) as ours, builds.opened(slower) as other:
        row = against.measure(
            (ours, other), 6, 0, "overhead", settings=dataclasses.asdict(settings), contender="adaptc",
            capture="whole", mode="training",
        )  # fmt: skip
    assert row["ratio"]["high"] < 0.7
    assert row["time"][1]["median"] > 0.02
    assert [facts["graphs"] for facts in row["facts"]] == [1, 1]


@pytest.mark.slow
def test_a_slower_build_is_told_by_its_training_step(slower: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--backend", "aot_eager", "--head-dim", "16", "--vocab", "64", "--rank", "4", "--dtypes", "fp32"]
    assert main(["train", *flags, "--dropouts", "0.05", "--against", str(slower), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "train-against-cpu.json").read_text())
    assert [(row["contender"], row["dropout"]) for row in found["rows"]] == [("adaptc", 0.05)]
    assert found["rows"][0]["ratio"]["median"] < 1 < found["rows"][0]["time"][1]["median"] / 0.02
    table = (tmp_path / "train-against-cpu.md").read_text()
    assert all(name in table for name in found["builds"])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_table_of_python_per_call_has_every_row_and_its_share_of_a_step(tmp_path: Path) -> None:
    assert main(["overhead", *TINY, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "overhead-cpu.json").read_text())
    assert len(found["rows"]) == 9
    assert all(len(row["time"]) == 1 and "ratio" not in row for row in found["rows"].values())
    assert all(name in (tmp_path / "overhead-cpu.md").read_text() for name in found["rows"])
    assert len(found["notes"]) == 2


@pytest.mark.slow
def test_a_build_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    wrong = changed_build(tmp_path / "wrong", "output.loss = 1.01 * output.loss")
    settings = Settings(layers=1, hidden=32, head_dim=16, vocab=64, tokens=8, rank=4, rounds=6, backend="eager")
    with pytest.raises(BenchError, match="DisagreementError: adaptc"):
        against.run(wrong, settings, [Case("fp32", 0.0)], ["adaptc"], tmp_path, "train")
    assert not list(tmp_path.glob("train*"))
