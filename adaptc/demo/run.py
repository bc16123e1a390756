"""The demo from start to end: data, baseline, LoRA through the compiler, report, pictures, PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import adaptc
from adaptc.codegen.toolchain import inductor_missing
from adaptc.demo.data import Corpus, load_corpus
from adaptc.demo.model import SentenceClassifier, TokenizedTexts, load_encoder, tokenize
from adaptc.demo.pictures import draw_loss, draw_sites
from adaptc.demo.report import (
    Agreement,
    Comparison,
    agreement,
    agreement_sentence,
    compare,
    corpus_table,
    paired_sentence,
    plan_sentence,
    probe_sentence,
    score_table,
    training_sentence,
    verdict,
)
from adaptc.demo.sites import SiteChange, site_changes
from adaptc.demo.training import History, Scores, Settings, fit_probe, logits_of, score, train_adapter
from adaptc.errors import AdaptcError

#: The linear layers of BERT's blocks: attention's three inputs, and every output and feed-forward layer.
TARGETS = ("query", "key", "value", "dense")

#: What the demo writes, and what each is.
OUTPUTS = {
    "loss.png": "training loss, accuracy and macro-F1 on dev",
    "sites.png": "how far training moved each weight",
    "metrics.json": "every figure above, and the time of each part",
    "adapter": "the trained adapter in PEFT's format",
}

INTRODUCTION = """\
The pretrained sentence encoder all-MiniLM-L6-v2 learns to tell the topics of
short texts: first with a head on the frozen encoder, then with LoRA.
Texts and weights come from installed packages; nothing is downloaded.
Models are fitted on train, choices made on dev, and test is only scored."""
FALLBACK = """\
Inductor cannot run here: {reason}.
The backend is aot_eager instead: the same rewritten graphs, run op by op."""

EncoderLoader = Callable[[], tuple[nn.Module, Any]]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    comparison: Comparison
    agreement: Agreement
    seconds: dict[str, float]


class DemoFolderError(AdaptcError, ValueError):
    """The output folder cannot be made, or holds something that is not the demo's."""


class _Stopwatch:
    """Seconds per named part of the demo."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(now - self._last, 2)
        self._last = now


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    backend: str = "inductor",
    settings: Settings | None = None,
    corpus: Corpus | None = None,
    encoder: EncoderLoader = load_encoder,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo and write ``OUTPUTS`` into ``out`` when all is done, in place of those of an earlier run.

    ``seed`` decides initial adapter values, order of the batches and dropout. The split of the texts is
    fixed: the settings were chosen without the test texts, and no seed may train on them. Where Inductor
    cannot generate code, "aot_eager" takes its place, and the reader is told.
    """
    watch = _Stopwatch()
    console = console or Console()
    prepare_folder(out)
    torch.manual_seed(seed)
    console.print(INTRODUCTION, highlight=False)
    backend = _usable(backend, console)
    demo = _Demo(settings or Settings(), seed, backend, corpus or load_corpus(), encoder, console, watch)
    materials = demo.load()
    baseline = demo.baseline(materials)
    adapted = demo.adapted(materials)
    demo.explain(adapted)
    comparison = demo.compared(baseline, adapted, materials.texts["test"].labels)
    changes = site_changes(adapted.model.adaptc.sites)
    agreed = demo.written(out, materials, baseline, adapted, changes)
    result = DemoResult(comparison, agreed, watch.seconds)
    _write_metrics(
        out / "metrics.json", result, demo.settings, seed, backend, demo.corpus, baseline.dev, adapted.history, changes
    )
    console.rule(f"Done in {sum(watch.seconds.values()):.0f} s", align="left")
    console.print(f"Written to {out}:", highlight=False, markup=False, soft_wrap=True)
    for name, meaning in OUTPUTS.items():
        console.print(f"  {name:<12}  {meaning}", highlight=False)
    return result


def _usable(backend: str, console: Console) -> str:
    """``backend``, or what takes its place where it cannot run; the reader is told."""
    if backend != "inductor" or not (reason := inductor_missing()):
        return backend
    console.print(FALLBACK.format(reason=reason), highlight=False, markup=False, soft_wrap=True)
    return "aot_eager"


@dataclasses.dataclass(frozen=True)
class _Materials:
    """What is trained, and on what: the texts of each split, by its name."""

    model: SentenceClassifier
    texts: dict[str, TokenizedTexts]


@dataclasses.dataclass(frozen=True)
class _Baseline:
    """The head on the frozen encoder: its scores on dev, and its logits of the test texts."""

    dev: Scores
    logits: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """The model with LoRA, how it was trained, and its logits of the test texts."""

    model: Any
    history: History
    logits: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Demo:
    """The parts of the demo. Each says on the console what it does and found, and is timed."""

    settings: Settings
    seed: int
    backend: str
    corpus: Corpus
    encoder: EncoderLoader
    console: Console
    watch: _Stopwatch

    def say(self, text: str, **style: Any) -> None:
        self.console.print(text, highlight=False, **style)

    def load(self) -> _Materials:
        self.console.rule("1. Labelled text", align="left")
        loaded, tokenizer = self.encoder()
        texts = {name: tokenize(tokenizer, split) for name, split in self.corpus.splits().items()}
        model = SentenceClassifier(loaded, len(self.corpus.topics))
        self.console.print(corpus_table(self.corpus))
        self.watch.lap("load")
        return _Materials(model, texts)

    def baseline(self, given: _Materials) -> _Baseline:
        self.console.rule("2. The frozen encoder with a trained head", align="left")
        size = self.settings.batch_size
        strength, probe = fit_probe(given.model, given.texts["train"], given.texts["dev"], size)
        logits = logits_of(given.model, given.texts["test"], size)
        self.say(probe_sentence(strength, probe))
        self.watch.lap("frozen_encoder")
        return _Baseline(probe, logits)

    def adapted(self, given: _Materials) -> _Adapted:
        self.console.rule("3. LoRA through adaptc.compile", align="left")
        self.say(plan_sentence(self.settings, self.backend))
        model = adaptc.compile(given.model, _plan(self.settings), backend=self.backend)
        classes = len(self.corpus.topics)
        history = _train_with_bar(model, given.texts, self.settings, seed=self.seed, classes=classes)
        self.say(training_sentence(history))
        self.watch.lap("train_lora")
        logits = logits_of(model, given.texts["test"], self.settings.batch_size)
        self.watch.lap("test_lora")
        return _Adapted(model, history, logits)

    def explain(self, adapted: _Adapted) -> None:
        self.console.rule("4. What the compiler did: model.adaptc.explain()", align="left")
        self.say(str(adapted.model.adaptc.explain()), markup=False, soft_wrap=True)
        self.watch.lap("explain")

    def compared(self, baseline: _Baseline, adapted: _Adapted, labels: torch.Tensor) -> Comparison:
        self.console.rule("5. Frozen encoder against LoRA, on the test texts", align="left")
        frozen, lora = baseline.logits.argmax(1), adapted.logits.argmax(1)
        comparison = compare(score(frozen, labels), score(lora, labels), frozen == labels, lora == labels)
        self.console.print(score_table(comparison, len(labels)))
        self.say(verdict(comparison), style="bold")
        self.say(paired_sentence(comparison))
        return comparison

    def written(
        self, out: Path, given: _Materials, baseline: _Baseline, adapted: _Adapted, changes: list[SiteChange]
    ) -> Agreement:
        """Writes the pictures and the adapter, and lets PEFT read it."""
        self.console.rule("6. The saved adapter, loaded and run by PEFT", align="left")
        draw_loss(adapted.history, baseline.dev, out / "loss.png")
        draw_sites(changes, out / "sites.png")
        adapted.model.adaptc.save(out / "adapter")
        self.watch.lap("pictures_and_save")
        by_peft = _logits_through_peft(
            out / "adapter", self.encoder, self.corpus, given.texts["test"], self.settings.batch_size
        )
        agreed = agreement(adapted.logits, by_peft)
        self.watch.lap("peft")
        self.say(agreement_sentence(agreed))
        return agreed


def prepare_folder(out: Path) -> None:
    """Make ``out``; it may hold results of an earlier run, and nothing else.

    Raises:
        DemoFolderError: it cannot be made or written, or there are other files.
    """
    do = "choose another folder with --out"
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in OUTPUTS)
    except OSError as error:
        raise DemoFolderError(f"{out} cannot be the output folder", found=error.strerror or error, do=do) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise DemoFolderError(f"{out} cannot be the output folder", found="no permission to write", do=do)
    if others:
        raise DemoFolderError(
            f"{out} holds other files than the demo's",
            expected=f"a new or empty folder, or one with {', '.join(OUTPUTS)}",
            found=", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else ""),
            do=do,
        )


def _plan(settings: Settings) -> adaptc.Plan:
    lora = adaptc.LoRA(r=settings.rank, alpha=settings.alpha, dropout=settings.dropout, targets=TARGETS)
    head = adaptc.Rule(match=adaptc.Match(targets=("head",)), train="full")
    return adaptc.Plan([lora, head])


def _train_with_bar(
    model: nn.Module, texts: dict[str, TokenizedTexts], settings: Settings, *, seed: int, classes: int
) -> History:
    from tqdm import tqdm

    handle: Any = model.adaptc
    # Without a terminal every update is a line of its own.
    interval = 0.5 if sys.stderr.isatty() else 15
    steps = math.ceil(len(texts["train"]) / settings.batch_size) * settings.epochs
    with tqdm(total=steps, desc="compiling, about a minute", unit="step", mininterval=interval) as bar:

        def on_step(loss: float, dev: Scores | None) -> None:
            if bar.n == 0:
                bar.unpause()  # the time of the compiler says nothing about the time left
                bar.set_description("training", refresh=False)
            if dev is not None:
                bar.set_postfix(loss=f"{loss:.3f}", dev_accuracy=f"{dev.accuracy:.3f}", refresh=False)
            bar.update()

        return train_adapter(
            model,
            list(handle.parameters()),
            texts["train"],
            texts["dev"],
            settings,
            seed=seed,
            classes=classes,
            on_step=on_step,
        )


def _logits_through_peft(
    folder: Path, encoder: EncoderLoader, corpus: Corpus, texts: TokenizedTexts, size: int
) -> torch.Tensor:
    """The saved adapter on a fresh base, loaded and run by PEFT alone."""
    from peft import PeftModel

    fresh = SentenceClassifier(encoder()[0], len(corpus.topics))
    return logits_of(PeftModel.from_pretrained(fresh, str(folder)), texts, size)


def _write_metrics(
    path: Path,
    result: DemoResult,
    settings: Settings,
    seed: int,
    backend: str,
    corpus: Corpus,
    probe: Scores,
    history: History,
    changes: list[SiteChange],
) -> None:
    content = {
        "seed": seed,
        "backend": backend,
        "settings": dataclasses.asdict(settings),
        "versions": {"adaptc": adaptc.__version__, "torch": torch.__version__},
        "topics": list(corpus.topics),
        "texts": {name: len(split) for name, split in corpus.splits().items()},
        "test": dataclasses.asdict(result.comparison) | {"lora_wins": result.comparison.lora_wins},
        "dev": {
            "frozen": dataclasses.asdict(probe),
            "lora": [{"step": step, **dataclasses.asdict(s)} for step, s in history.dev],
            "kept_step": history.kept,
        },
        "peft": dataclasses.asdict(result.agreement),
        "losses": history.losses,
        "sites": [dataclasses.asdict(change) for change in changes],
        "seconds": result.seconds | {"first_step": round(history.first_step_s, 2)},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
