"""What the demo tells its reader: tables, and a verdict that says so when LoRA does not win."""

from __future__ import annotations

import dataclasses
import math

from rich.table import Table
from torch import Tensor

from adaptc.demo.data import Corpus
from adaptc.demo.training import PROBE_STRENGTHS, History, Scores, Settings


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both contenders on the same test texts.

    ``only_lora`` and ``only_frozen`` count the texts that one alone labels correctly; ``p_value`` is
    McNemar's exact two-sided test on these two counts.
    """

    frozen: Scores
    lora: Scores
    only_lora: int
    only_frozen: int
    p_value: float

    @property
    def lora_wins(self) -> bool:
        return self.lora.accuracy > self.frozen.accuracy and self.lora.macro_f1 > self.frozen.macro_f1


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How the logits of two models compare over the same texts."""

    texts: int
    equal_predictions: int
    max_difference: float

    @property
    def holds(self) -> bool:
        return self.equal_predictions == self.texts


def compare(frozen: Scores, lora: Scores, frozen_right: Tensor, lora_right: Tensor) -> Comparison:
    """The comparison of two boolean vectors of correct answers, with the scores beside them."""
    only_lora = int((lora_right & ~frozen_right).sum())
    only_frozen = int((frozen_right & ~lora_right).sum())
    return Comparison(frozen, lora, only_lora, only_frozen, mcnemar(only_lora, only_frozen))


def mcnemar(first: int, second: int) -> float:
    """Two-sided p-value of ``first`` against ``second`` under a fair coin."""
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1))
    return min(1.0, float(2 * tail / 2**total))


def agreement(ours: Tensor, theirs: Tensor) -> Agreement:
    """Of two (texts, classes) matrices of logits."""
    equal = int((ours.argmax(1) == theirs.argmax(1)).sum())
    return Agreement(len(ours), equal, float((ours - theirs).abs().max()))


def verdict(result: Comparison) -> str:
    """One sentence; it claims a win only when both figures are better."""
    accuracy = 100 * (result.lora.accuracy - result.frozen.accuracy)
    macro = 100 * (result.lora.macro_f1 - result.frozen.macro_f1)
    figures = f"accuracy {accuracy:+.1f} points, macro-F1 {macro:+.1f} points"
    if not result.lora_wins:
        return f"LoRA does not win over the frozen encoder here: {figures}."
    return f"LoRA wins over the frozen encoder: {figures}."


def paired_sentence(result: Comparison) -> str:
    """What stands behind the verdict: the texts on which the two differ."""
    return (
        f"Right with LoRA only: {result.only_lora} texts; with the frozen encoder only: {result.only_frozen}\n"
        f"(McNemar's exact test: p = {result.p_value:.2g})."
    )


def probe_sentence(strength: float, dev: Scores) -> str:
    """How the baseline was fitted."""
    return (
        f"Logistic regression on the encoder's sentence vectors. Of {len(PROBE_STRENGTHS)} strengths of\n"
        f"regularisation the best on dev is C = {strength:g}: {_both(dev)}."
    )


def plan_sentence(settings: Settings, backend: str) -> str:
    """What is trained, and through which backend."""
    return (
        f"Rank {settings.rank} on every linear layer of the encoder's blocks, and the head of part 2\n"
        f"trained further. Backend {backend}."
    )


def training_sentence(history: History) -> str:
    """How long compiling and training took, and which epoch dev chose."""
    epochs = [step for step, _ in history.dev if step > 0]
    return (
        f"The first step took {history.first_step_s:.0f} s, most of it compiling; the other "
        f"{len(history.losses) - 1} took {history.total_s - history.first_step_s:.0f} s.\n"
        f"Of {len(epochs)} epochs the best on dev is number {epochs.index(history.kept) + 1}: "
        f"{_both(dict(history.dev)[history.kept])}."
    )


def agreement_sentence(agreed: Agreement) -> str:
    """What PEFT makes of the saved adapter."""
    return (
        f"{agreed.equal_predictions} of {agreed.texts} predictions are equal; logits differ by at most "
        f"{agreed.max_difference:.1e}."
    )


def _both(scores: Scores) -> str:
    return f"accuracy {scores.accuracy:.3f}, macro-F1 {scores.macro_f1:.3f}"


def corpus_table(corpus: Corpus) -> Table:
    """Texts per topic and split."""
    table = Table(caption="texts of chatterbot-corpus, English", caption_justify="left")
    table.add_column("topic")
    for name in corpus.splits():
        table.add_column(name, justify="right")
    for label, topic in enumerate(corpus.topics):
        counts = (sum(e.label == label for e in split) for split in corpus.splits().values())
        table.add_row(topic, *map(str, counts))
    table.add_section()
    table.add_row("all", *(str(len(split)) for split in corpus.splits().values()))
    return table


def score_table(result: Comparison, texts: int) -> Table:
    """Both contenders' scores on the test split."""
    table = Table(caption=f"{texts} texts", caption_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("macro-F1", justify="right")
    for name, scores in (("frozen encoder + head", result.frozen), ("LoRA + head", result.lora)):
        table.add_row(name, f"{scores.accuracy:.3f}", f"{scores.macro_f1:.3f}")
    return table
