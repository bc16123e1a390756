"""The table ``train`` from end to end, on a tiny model."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import train
from bench.__main__ import main
from bench.contenders import BUILDERS, USUAL, Base, Contender, build_floor, build_peft_eager
from bench.settings import Case, Settings
from bench.torch_internals import graph_counts, has_both_libraries

TINY = {"layers": 1, "hidden": 64, "head_dim": 16, "vocab": 64, "tokens": 24, "rank": 4, "rounds": 6}
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(autouse=True)
def forget_compiled_frames() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    settings = Settings(**TINY, backend="aot_eager", warmup=1)  # type: ignore[arg-type]
    return train.measure(settings, [Case("fp32", 0.0), Case("bf16", 0.05)], list(USUAL))


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for case in results["cases"] for row in case["contenders"].values()]


@pytest.mark.slow
def test_every_contender_is_measured_in_every_case(results: dict[str, Any]) -> None:
    assert [(case["dtype"], case["dropout"]) for case in results["cases"]] == [("fp32", 0.0), ("bf16", 0.05)]
    for case in results["cases"]:
        assert list(case["contenders"]) == ["floor", "peft-eager", "peft-compile", "adaptc"]
    for row in rows(results):
        assert len(row["seconds"]) == 6
        assert min(row["seconds"]) > 0


def test_ratios_are_paired_by_round(results: dict[str, Any]) -> None:
    for case in results["cases"]:
        floor = case["contenders"]["floor"]["seconds"]
        for row in case["contenders"].values():
            ratios = sorted(a / b for a, b in zip(row["seconds"], floor, strict=True))
            assert row["over_floor"]["median"] == pytest.approx((ratios[2] + ratios[3]) / 2)
            assert (row["over_floor"]["low"], row["over_floor"]["high"]) == (ratios[0], ratios[5])
        assert case["contenders"]["peft-compile"]["over_peft_compile"]["median"] == 1


def test_libraries_are_timed_where_torch_chooses_between_them(results: dict[str, Any]) -> None:
    in_fp32, in_bf16 = results["cases"]
    assert ("libraries" in in_fp32, "libraries" in in_bf16) == (has_both_libraries(), False)
    for found in in_fp32.get("libraries", {}).values():
        assert 0 < found["low"] <= found["median"] <= found["high"]


def test_graphs_are_counted_and_nothing_recompiles(results: dict[str, Any]) -> None:
    for case in results["cases"]:
        found = {name: (row["graphs"], row["recompiles"]) for name, row in case["contenders"].items()}
        assert found == {"floor": (1, 0), "peft-eager": (0, 0), "peft-compile": (1, 0), "adaptc": (1, 0)}
        assert case["contenders"]["adaptc"]["own_counts"]["graphs"] == 1
        assert case["contenders"]["adaptc"]["own_counts"]["recompiles"] == 0


def test_bytes_of_eager_peft_are_confirmed_by_the_second_instrument(results: dict[str, Any]) -> None:
    for case in results["cases"]:
        row = case["contenders"]["peft-eager"]
        assert 0 <= row["saved_bytes"] - row["saved_bytes_by_hooks"] <= 256
        assert all(r["saved_bytes"] < r["peak_bytes"] for r in case["contenders"].values())
        floor = case["contenders"]["floor"]["saved_bytes"]
        assert row["saved_over_floor"] == row["saved_bytes"] / floor > 1


def test_adapters_are_fp32_by_default_on_both_bases(results: dict[str, Any]) -> None:
    for case in results["cases"]:
        found = {name: row["adapter_dtypes"] for name, row in case["contenders"].items()}
        assert found == {
            "floor": [], "peft-eager": ["float32"], "peft-compile": ["float32"], "adaptc": ["float32"]
        }  # fmt: skip


def test_the_result_says_what_ran_and_names_no_host_and_no_path(results: dict[str, Any]) -> None:
    assert results["flags"]["hidden"] == 64
    assert results["flags"]["intermediate"] == 176
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"]["peft"][0].isdigit()
    assert results["versions"]["adaptc"][0].isdigit()
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["memory_gib"] >= 1
    text = json.dumps({key: value for key, value in results.items() if key != "method"})
    assert platform.node() not in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text


@pytest.mark.slow
def test_the_command_writes_data_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backend", "eager", "--dtypes", "fp32", "--dropouts", "0", "--contenders", "floor,peft-eager"]
    assert main(["train", *FLAGS, *flags, "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["train-cpu.json", "train-cpu.md", "train-cpu.png"]
    shown = capsys.readouterr().out
    assert shown.strip() == (tmp_path / "train-cpu.md").read_text().strip()
    assert "| PEFT, eager | float32 |" in shown
    assert main(["render", str(tmp_path / "train-cpu.json")]) == 0


def test_a_contender_that_computes_something_else_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_wrong(base: Base, settings: Settings, case: Case) -> Contender:
        contender = build_peft_eager(base, settings, case)
        with torch.no_grad():
            contender.adapter["model.layers.0.mlp.up_proj.lora_B"].mul_(2)
        return contender

    monkeypatch.setitem(BUILDERS, "adaptc", build_wrong)
    flags = ["--backend", "eager", "--dtypes", "fp32", "--dropouts", "0", "--contenders", "floor,adaptc"]
    assert main(["train", *FLAGS, *flags, "--out", str(tmp_path)]) == 2
    assert "refused: peft-eager (fp32, p = 0): " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_recompiles_are_attributed_to_who_caused_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_restless(base: Base, settings: Settings, case: Case) -> Contender:
        contender = build_floor(base, settings, case)
        sizes = iter(range(100))

        @torch.compile(backend="eager", dynamic=False)
        def grow(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        steady = contender.step

        def step() -> torch.Tensor:
            grow(torch.zeros(next(sizes) + 2))
            return steady()

        contender.step = step  # type: ignore[method-assign]
        return contender

    monkeypatch.setitem(BUILDERS, "peft-compile", build_restless)
    settings = Settings(**{**TINY, "rounds": 2}, backend="eager", warmup=2)  # type: ignore[arg-type]
    found = train.measure(settings, [Case("fp32", 0.0)], ["floor", "peft-compile"])["cases"][0]["contenders"]
    assert (found["floor"]["graphs"], found["floor"]["recompiles"]) == (1, 0)
    # The model is the floor's again, whose graph Dynamo reuses, so the first step captures ``grow`` only; two
    # warm-up steps, two timed ones and a profiled one grow again.
    assert (found["peft-compile"]["graphs"], found["peft-compile"]["recompiles"]) == (1, 5)


def test_graph_breaks_are_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x * 2

    before = graph_counts()
    torch.compile(lambda x: broken(x + 1) + 1, backend="eager")(torch.ones(3))
    found = graph_counts() - before
    assert found.breaks >= 1
    assert found.graphs >= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contenders", "floor,nobody"], "refused: unknown contenders ['nobody']; known: floor, peft"),
        (["--dtypes", "int4"], "refused: unknown dtype 'int4'; known: fp32, bf16, fp16"),
        (["--dropouts", "1.5"], "refused: dropout 1.5 is not in [0, 1)"),
        (["--hidden", "100"], "refused: --hidden 100 is not a multiple of --head-dim 64"),
        (["--rounds", "0"], "refused: --rounds must be at least 1, not 0"),
    ],
)
def test_flags_that_make_no_run_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_table_on_cuda() -> None:
    settings = Settings(**TINY, backend="aot_eager", device="cuda")
    found = train.measure(settings, [Case("bf16", 0.05)], list(USUAL))
    assert found["machine"]["gpu"]
    assert all(row["peak_bytes"] > row["saved_bytes"] > 0 for row in rows(found))
