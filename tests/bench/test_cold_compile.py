"""Cold compilation: equal and empty caches for everyone, one process each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import cold
from bench.errors import BenchError
from bench.settings import Case, Settings

TINY = Settings(layers=1, hidden=64, head_dim=16, vocab=64, tokens=16, rank=4, backend="aot_eager", cold=1)


def test_every_cache_is_an_empty_folder_of_its_own(tmp_path: Path) -> None:
    inherited = {"TORCHINDUCTOR_CACHE_DIR": "warm", "PATH": "kept"}
    found = cold.fresh_environment(tmp_path, inherited)
    assert found["PATH"] == "kept"
    assert inherited["TORCHINDUCTOR_CACHE_DIR"] == "warm"
    places = [Path(found[name]) for name in cold.CACHE_VARIABLES]
    assert len(set(places)) == len(places)
    assert all(place.parent == tmp_path and not list(place.iterdir()) for place in places)


@pytest.mark.slow
def test_contenders_are_compiled_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    run = subprocess.run

    def watched(command: list[str], **options: Any) -> Any:
        started.append(options["env"])
        return run(command, **options)

    monkeypatch.setattr("bench.cold.subprocess.run", watched)
    found = cold.measure_cold(TINY, Case("fp32", 0.0), ["floor", "peft-compile"])
    assert [len(found[name]) for name in ("floor", "peft-compile")] == [1, 1]
    assert all(seconds > 0 for times in found.values() for seconds in times)
    folders = {environment["TORCHINDUCTOR_CACHE_DIR"] for environment in started}
    assert len(folders) == 2
    assert not any(os.path.exists(folder) for folder in folders)


@pytest.mark.slow
def test_a_process_that_fails_is_shown() -> None:
    expected = r"cold compile of nobody \(fp32, p = 0\) ended with 1:\n(.*\n)*KeyError: 'nobody'"
    with pytest.raises(BenchError, match=expected):
        cold.measure_cold(TINY, Case("fp32", 0.0), ["nobody"])
