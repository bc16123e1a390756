"""The demo from start to end, with a tiny encoder; once with the real weights, on few texts."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from adaptc.codegen import toolchain
from adaptc.demo import run
from adaptc.demo.data import load_corpus
from adaptc.demo.model import SentenceClassifier, load_encoder, tokenize
from adaptc.demo.training import Settings, logits_of
from tests.demo import tiny

SETTINGS = Settings(rank=3, alpha=6, epochs=2, batch_size=8, learning_rate=3e-3)


@dataclasses.dataclass
class Finished:
    out: Path
    result: run.DemoResult
    printed: str
    metrics: dict[str, Any]


def _run(out: Path, **arguments: Any) -> Finished:
    console = Console(file=io.StringIO(), width=100)
    result = run.run_demo(out, console=console, **arguments)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return Finished(out, result, printed, json.loads((out / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return _run(
        tmp_path_factory.mktemp("demo") / "new" / "folder",
        seed=1,
        backend="aot_eager",
        settings=SETTINGS,
        corpus=tiny.corpus(),
        encoder=tiny.encoder,
    )


def test_peft_predicts_the_same(finished: Finished) -> None:
    texts = len(tiny.corpus().test)
    assert finished.result.agreement.holds
    assert finished.result.agreement.texts == texts
    assert finished.result.agreement.max_difference < 1e-4
    assert f"{texts} of {texts} predictions are equal" in finished.printed


def test_the_adapter_on_disk_is_trained_and_gives_the_reported_scores(finished: Finished) -> None:
    corpus = tiny.corpus()
    encoder, tokenizer = tiny.encoder()
    fresh = SentenceClassifier(encoder, len(corpus.topics))
    loaded = PeftModel.from_pretrained(fresh, str(finished.out / "adapter"))
    test = tokenize(tokenizer, corpus.test)
    right = (logits_of(loaded, test, 8).argmax(1) == test.labels).double().mean()
    assert float(right) == pytest.approx(finished.result.comparison.lora.accuracy)
    tensors = load_file(finished.out / "adapter" / "adapter_model.safetensors")
    moved = [float(t.norm()) for name, t in tensors.items() if "lora_B" in name]
    assert len(moved) == 12  # two layers of query, key, value and three dense
    assert min(moved) > 0


def test_a_changed_adapter_is_noticed(finished: Finished, tmp_path: Path) -> None:
    corpus = tiny.corpus()
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (finished.out / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: -t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    texts = tokenize(tiny.tokenizer(), corpus.test)
    ours = run._logits_through_peft(finished.out / "adapter", tiny.encoder, corpus, texts, 8)
    theirs = run._logits_through_peft(folder, tiny.encoder, corpus, texts, 8)
    assert not run.agreement(ours, theirs).holds


def test_metrics_tell_the_whole_run(finished: Finished) -> None:
    metrics = finished.metrics
    assert metrics["seed"] == 1 and metrics["backend"] == "aot_eager"
    assert metrics["settings"] == dataclasses.asdict(SETTINGS)
    assert metrics["test"]["lora"] == dataclasses.asdict(finished.result.comparison.lora)
    assert metrics["test"]["lora_wins"] is finished.result.comparison.lora_wins
    steps = [scores["step"] for scores in metrics["dev"]["lora"]]
    assert steps == [0, len(metrics["losses"]) // 2, len(metrics["losses"])]
    assert metrics["dev"]["kept_step"] in steps[1:]
    assert [site["path"] for site in metrics["sites"]][-1] == "head"
    assert all(site["ratio"] > 0 for site in metrics["sites"])
    assert set(metrics["seconds"]) >= {"load", "frozen_encoder", "train_lora", "first_step", "peft"}


def test_the_reader_sees_scores_verdict_report_and_files(finished: Finished) -> None:
    comparison = finished.result.comparison
    for text in (
        "food", "tools", "frozen encoder + head", "LoRA + head",
        f"{comparison.frozen.accuracy:.3f}", f"{comparison.lora.macro_f1:.3f}",
        run.verdict(comparison), "encoder.encoder.layer",
    ):  # fmt: skip
        assert text in finished.printed, text
    assert {p.name for p in finished.out.iterdir()} == {"loss.png", "sites.png", "metrics.json", "adapter"}
    assert f"Written to {finished.out}:" in finished.printed.replace("\n", "")
    assert all(f"  {name}" in finished.printed for name in run.OUTPUTS)


def test_before_the_first_step_lora_scores_as_the_frozen_encoder(finished: Finished) -> None:
    dev = finished.metrics["dev"]
    start = {name: value for name, value in dev["lora"][0].items() if name != "step"}
    assert start == dev["frozen"]


def test_without_inductor_another_backend_takes_its_place_and_the_reader_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compile(model: Any, plan: Any, *, backend: str) -> Any:
        asked.append(backend)
        raise KeyboardInterrupt  # the rest is as elsewhere

    reason = "InvalidCxxCompiler: No working C++ compiler"
    monkeypatch.setattr(toolchain.torch_internals, "inductor_missing", lambda: reason)
    monkeypatch.setattr(run.adaptc, "compile", compile)
    console = Console(file=io.StringIO(), width=100)
    with pytest.raises(KeyboardInterrupt):
        run.run_demo(tmp_path / "out", corpus=tiny.corpus(), encoder=tiny.encoder, console=console)
    assert asked == ["aot_eager"]
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "No working C++ compiler" in printed
    assert "backend is aot_eager instead" in printed and "Backend aot_eager." in printed
    assert list((tmp_path / "out").iterdir()) == []  # nothing half-done


def test_absent_python_headers_stand_in_inductors_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.torch_internals, "inductor_missing", lambda: None)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python.h" in (toolchain.inductor_missing() or "")
    (tmp_path / "Python.h").touch()
    assert toolchain.inductor_missing() is None


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.tex", "metrics.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(run.DemoFolderError, match=r"other files(.|\n)*thesis.tex(.|\n)*--out"):
        run.run_demo(tmp_path, corpus=tiny.corpus(), encoder=tiny.encoder)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"thesis.tex": "mine", "metrics.json": "mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(run.DemoFolderError, match=r"cannot be the output folder(.|\n)*--out"):
            run.prepare_folder(out)


def test_an_earlier_runs_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ("loss.png", "sites.png", "metrics.json"):
        (tmp_path / name).touch()
    run.prepare_folder(tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.slow
def test_a_second_run_with_the_same_seed_repeats_the_first(finished: Finished) -> None:
    again = _run(
        finished.out,
        seed=1,
        backend="aot_eager",
        settings=SETTINGS,
        corpus=tiny.corpus(),
        encoder=tiny.encoder,
    )
    assert again.metrics["losses"] == pytest.approx(finished.metrics["losses"], rel=1e-4)
    assert again.result.comparison == finished.result.comparison


def test_the_frozen_encoder_stays_frozen(tmp_path: Path) -> None:
    seen = []

    def encoder() -> tuple[Any, Any]:
        loaded = tiny.encoder()
        seen.append(loaded[0])
        return loaded

    settings = dataclasses.replace(SETTINGS, epochs=1)
    _run(tmp_path, backend="eager", settings=settings, corpus=tiny.corpus(), encoder=encoder)
    before = dict(tiny.encoder()[0].named_parameters())
    after = dict(seen[0].named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_the_real_encoder_learns_from_a_few_texts(tmp_path: Path) -> None:
    whole = load_corpus()
    kept = [whole.topics.index(name) for name in ("coding", "literature", "psychology")]

    def few(examples: tuple[Any, ...], each: int) -> tuple[Any, ...]:
        chosen = [[e for e in examples if e.label == old][:each] for old in kept]
        return tuple(dataclasses.replace(e, label=new) for new, group in enumerate(chosen) for e in group)

    corpus = dataclasses.replace(
        whole,
        topics=("coding", "literature", "psychology"),
        train=few(whole.train, 16),
        dev=few(whole.dev, 6),
        test=few(whole.test, 10),
    )
    settings = Settings(epochs=1)
    done = _run(tmp_path, backend="eager", settings=settings, corpus=corpus, encoder=load_encoder)
    assert done.result.agreement.holds
    assert done.result.comparison.lora.accuracy > 0.6  # chance is 1/3
    assert len(done.metrics["sites"]) == 6 * 6 + 1
