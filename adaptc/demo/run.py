"""The demo from start to end: data, baseline, LoRA through the compiler, report, pictures, PEFT."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import adaptc
from adaptc.demo.data import Corpus, load_corpus
from adaptc.demo.model import SentenceClassifier, TokenizedTexts, load_encoder, tokenize
from adaptc.demo.pictures import draw_loss, draw_sites
from adaptc.demo.report import (
    Agreement,
    Comparison,
    agreement,
    compare,
    corpus_table,
    paired_sentence,
    score_table,
    verdict,
)
from adaptc.demo.sites import SiteChange, site_changes
from adaptc.demo.training import History, Scores, Settings, fit_probe, logits_of, score, train_adapter

#: The linear layers of BERT's blocks: attention's three inputs, and every output and feed-forward layer.
TARGETS = ("query", "key", "value", "dense")

EncoderLoader = Callable[[], tuple[nn.Module, Any]]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    comparison: Comparison
    agreement: Agreement
    seconds: dict[str, float]


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
    """Run the demo and write ``loss.png``, ``sites.png``, ``metrics.json`` and ``adapter/`` into ``out``.

    ``seed`` decides initial adapter values, order of the batches and dropout. The split of the texts is
    fixed: the settings were chosen without the test texts, and no seed may train on them.
    """
    console = console or Console()
    settings = settings or Settings()
    corpus = corpus or load_corpus()
    watch = _Stopwatch()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)

    loaded, tokenizer = encoder()
    texts = {name: tokenize(tokenizer, split) for name, split in corpus.splits().items()}
    model = SentenceClassifier(loaded, len(corpus.topics))
    console.print(corpus_table(corpus))
    watch.lap("load")

    strength, probe = fit_probe(model, texts["train"], texts["dev"])
    frozen_logits = logits_of(model, texts["test"])
    console.print(f"Frozen encoder: head fitted (C = {strength:g}), dev accuracy {probe.accuracy:.3f}.")
    watch.lap("frozen_encoder")

    model = adaptc.compile(model, _plan(settings), backend=backend)
    handle: Any = model.adaptc
    history = _train_with_bar(model, texts, settings, seed=seed, classes=len(corpus.topics))
    watch.lap("train_lora")
    lora_logits = logits_of(model, texts["test"])
    watch.lap("test_lora")
    console.print(str(handle.explain()), markup=False, highlight=False, soft_wrap=True)

    labels = texts["test"].labels
    comparison = compare(
        score(frozen_logits.argmax(1), labels),
        score(lora_logits.argmax(1), labels),
        frozen_logits.argmax(1) == labels,
        lora_logits.argmax(1) == labels,
    )
    console.print(score_table(comparison, len(labels)))
    console.print(verdict(comparison), highlight=False)
    console.print(paired_sentence(comparison), highlight=False)

    changes = site_changes(handle.sites)
    draw_loss(history, probe, out / "loss.png")
    draw_sites(changes, out / "sites.png")
    handle.save(out / "adapter")
    watch.lap("pictures_and_save")
    agreed = agreement(lora_logits, _logits_through_peft(out / "adapter", encoder, corpus, texts["test"]))
    watch.lap("peft")
    console.print(_agreement_sentence(agreed), highlight=False)

    result = DemoResult(comparison, agreed, watch.seconds)
    _write_metrics(out / "metrics.json", result, settings, seed, backend, corpus, probe, history, changes)
    total = sum(watch.seconds.values())
    console.print(f"Wrote loss.png, sites.png, metrics.json and adapter/ to {out} ({total:.0f} s in all).")
    return result


def _plan(settings: Settings) -> adaptc.Plan:
    lora = adaptc.LoRA(r=settings.rank, alpha=settings.alpha, dropout=settings.dropout, targets=TARGETS)
    head = adaptc.Rule(match=adaptc.Match(targets=("head",)), train="full")
    return adaptc.Plan([lora, head])


def _train_with_bar(
    model: nn.Module, texts: dict[str, TokenizedTexts], settings: Settings, *, seed: int, classes: int
) -> History:
    from tqdm import tqdm

    handle: Any = model.adaptc
    with tqdm(desc="LoRA (the first steps compile)", unit="step", mininterval=0.5) as bar:

        def on_step(loss: float, dev: Scores | None, steps: int) -> None:
            bar.total = steps
            bar.update()
            if dev is not None:
                bar.set_postfix(loss=f"{loss:.3f}", dev_accuracy=f"{dev.accuracy:.3f}")

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


def _logits_through_peft(folder: Path, encoder: EncoderLoader, corpus: Corpus, texts: TokenizedTexts) -> torch.Tensor:
    """The saved adapter on a fresh base, loaded and run by PEFT alone."""
    from peft import PeftModel

    fresh = SentenceClassifier(encoder()[0], len(corpus.topics))
    return logits_of(PeftModel.from_pretrained(fresh, str(folder)), texts)


def _agreement_sentence(agreed: Agreement) -> str:
    return (
        f"Loaded through PEFT: {agreed.equal_predictions} of {agreed.texts} predictions equal, "
        f"largest difference of logits {agreed.max_difference:.1e}."
    )


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
            "lora_by_epoch": [{"step": step, **dataclasses.asdict(s)} for step, s in history.dev],
        },
        "peft": dataclasses.asdict(result.agreement),
        "losses": history.losses,
        "sites": [dataclasses.asdict(change) for change in changes],
        "seconds": result.seconds | {"first_step": round(history.first_step_s, 2)},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
