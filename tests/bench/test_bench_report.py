"""What the result files say, from made-up results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.errors import BenchError


def interval(median: float, spread: float = 0.0) -> dict[str, float]:
    return {"median": median, "low": median - spread, "high": median + spread, "coverage": 0.96}


def row(seconds: float, over: float, mib: float) -> dict[str, Any]:
    return {
        "time": interval(seconds, 0.001),
        "over_floor": interval(over, 0.01),
        "over_peft_compile": interval(over / 1.25),
        "peak_bytes": 2 * mib * 2**20,
        "saved_bytes": mib * 2**20,
        "peak_over_peft_compile": 2 * mib / 100,
        "saved_over_peft_compile": mib / 100,
        "graphs": 1,
        "graph_breaks": 0,
        "recompiles": 2,
        "adapter_dtypes": ["float32"],
    }


RESULTS: dict[str, Any] = {
    "table": "train",
    "date": "2001-02-03",
    "flags": {
        "layers": 4, "hidden": 96, "intermediate": 264, "batch": 1, "tokens": 32, "rank": 16, "rounds": 20,
        "backend": "inductor", "device": "cpu",
    },
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "memory_gib": 24, "cpu_capability": "AVX2"},
    "method": {"step": "what a step is"},
    "cases": [
        {
            "dtype": "bf16",
            "dropout": 0.05,
            "contenders": {"floor": row(0.2, 1.0, 50), "adaptc": row(0.25, 1.25, 80)},
        }
    ],
}  # fmt: skip


def test_the_table_shows_medians_intervals_and_ratios() -> None:
    text = report.markdown(RESULTS)
    assert "Llama: 4 layers, hidden 96, MLP 264, 1 x 32 tokens; backend inductor; 20 rounds; 2001" in text
    assert "Machine: Some CPU, 2 cores, 2 threads, 24 GiB, AVX2." in text
    assert "Versions: python 3.11, torch 2.13.0." in text
    assert "## bf16 base, dropout 0.05" in text
    assert (
        "| adaptc | float32 | 250.0 [249.0, 251.0] | 1.250 [1.240, 1.260] | 1.000 | 160.0 | 1.600 "
        "| 80.0 | 0.800 | 1 | 0 | 2 |"
    ) in text
    assert "- step: what a step is" in text
    assert "cold compile" not in text


def test_the_gpu_is_the_machine_when_there_is_one() -> None:
    results = copy.deepcopy(RESULTS)
    results["machine"]["gpu"] = "Some GPU"
    assert "Machine: Some GPU, 24 GiB" in report.markdown(results)


def test_what_was_not_measured_is_a_dash() -> None:
    results = copy.deepcopy(RESULTS)
    for key in ("over_floor", "over_peft_compile", "peak_over_peft_compile", "saved_over_peft_compile"):
        del results["cases"][0]["contenders"]["adaptc"][key]
    expected = "| adaptc | float32 | 250.0 [249.0, 251.0] | - | - | 160.0 | - | 80.0 | - |"
    assert expected in report.markdown(results)


def test_the_libraries_of_products_have_a_line() -> None:
    results = copy.deepcopy(RESULTS)
    results["cases"][0]["libraries"] = {
        "mkl": interval(0.6, 0.01), "onednn": interval(0.54), "onednn_over_mkl": interval(0.9, 0.02),
    }  # fmt: skip
    line = (
        "The base's linear layers alone, forward and backward: 600.0 [590.0, 610.0] ms in MKL and 540.0 ms in oneDNN; "
        "oneDNN over MKL 0.900 [0.880, 0.920]."
    )
    assert line in report.markdown(results)
    assert "oneDNN over MKL" not in report.markdown(RESULTS)


def test_another_way_to_adaptc_is_compared_with_the_plan() -> None:
    assert "/adaptc |" not in report.markdown(RESULTS)
    results = copy.deepcopy(RESULTS)
    contenders = results["cases"][0]["contenders"]
    contenders["adaptc-backend"] = {**row(0.255, 1.275, 80), "over_adaptc": interval(1.02, 0.01)}
    text = report.markdown(results)
    assert "| step ms | /floor | /PEFT | /adaptc | peak MiB |" in text
    assert "1.275 [1.265, 1.285] | 1.020 | 1.020 [1.010, 1.030] | 160.0 |" in text
    assert "1.250 [1.240, 1.260] | 1.000 | - | 160.0 |" in text


def test_cold_compilation_has_a_table_of_its_own() -> None:
    results = copy.deepcopy(RESULTS)
    measured = {"time": interval(31.5, 0.5), "over_peft_compile": interval(0.9)}
    results["cases"][0]["cold"] = {"adaptc": measured}
    text = report.markdown(results)
    assert "| cold compile | seconds | /floor | /PEFT | /adaptc |" in text
    assert "| adaptc | 31.5 [31.0, 32.0] | - | 0.900 | - |" in text


def test_files_come_from_the_data_and_can_be_made_again(tmp_path: Path) -> None:
    written = report.write(RESULTS, tmp_path / "new", "train-cpu")
    assert [path.name for path in written] == ["train-cpu.json", "train-cpu.md", "train-cpu.png"]
    assert json.loads(written[0].read_text()) == RESULTS
    assert written[1].read_text() == report.markdown(RESULTS)
    assert written[2].read_bytes().startswith(b"\x89PNG")
    written[1].unlink()
    report.render(written[0])
    assert written[1].read_text() == report.markdown(RESULTS)


def test_a_plot_without_the_floor_shows_seconds(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    for each in results["cases"][0]["contenders"].values():
        del each["over_floor"]
    report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_rendering_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"no result file .*nothing\.json"):
        report.render(tmp_path / "nothing.json")


def test_a_missing_plot_library_is_said_before_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"needs matplotlib; .* pip install 'adaptc\[bench\]'"):
        report.require_plotting()


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0], [3.0, 3.0]), ([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0])]
)
def test_quartiles(values: list[float], expected: list[float]) -> None:
    assert report.quartiles(values) == expected
