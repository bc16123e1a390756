"""The demo's verdict and comparisons."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from adaptc.demo import report
from adaptc.demo.report import Comparison, agreement, compare, mcnemar, verdict
from adaptc.demo.training import History, Scores
from tests.demo import tiny


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 9), (9, 3), (5, 5), (22, 4), (0, 12)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("lora", "wins"),
    [
        (Scores(0.82, 0.72), True),
        (Scores(0.80, 0.72), False),
        (Scores(0.82, 0.70), False),
        (Scores(0.78, 0.74), False),
        (Scores(0.80, 0.70), False),
    ],
)
def test_a_win_is_claimed_only_when_both_figures_are_better(lora: Scores, wins: bool) -> None:
    result = Comparison(Scores(0.80, 0.70), lora, 0, 0, 1.0)
    assert result.lora_wins is wins
    said = verdict(result)
    assert said.startswith("LoRA wins over" if wins else "LoRA does not win over")
    assert f"accuracy {100 * (lora.accuracy - 0.8):+.1f} points" in said
    assert f"macro-F1 {100 * (lora.macro_f1 - 0.7):+.1f} points" in said


def test_a_comparison_counts_the_texts_that_one_alone_gets_right() -> None:
    frozen = torch.tensor([True, True, False, False, False])
    lora = torch.tensor([True, False, True, True, False])
    result = compare(Scores(0.4, 0.4), Scores(0.6, 0.6), frozen, lora)
    assert (result.only_lora, result.only_frozen) == (2, 1)
    assert result.p_value == mcnemar(2, 1)
    assert "LoRA only: 2 texts" in report.paired_sentence(result)


def test_agreement_counts_equal_predictions_and_the_largest_difference() -> None:
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.5]])
    theirs = torch.tensor([[1.0, 0.25], [0.0, 1.0], [0.5, 0.6]])
    found = agreement(ours, theirs)
    assert (found.texts, found.equal_predictions, found.max_difference) == (3, 2, 0.25)
    assert not found.holds
    assert agreement(ours, ours.clone()).holds


def test_the_training_sentence_names_times_and_the_epoch_that_dev_chose() -> None:
    dev = [(0, Scores(0.5, 0.4)), (3, Scores(0.8, 0.7)), (6, Scores(0.75, 0.65))]
    said = report.training_sentence(History([1.0] * 6, dev, kept=3, first_step_s=40.0, total_s=41.0))
    for part in ("first step took 40 s", "other 5 took 1 s", "number 1: accuracy 0.800, macro-F1 0.700"):
        assert part in said


def test_tables_show_the_counts_and_both_scores() -> None:
    corpus = tiny.corpus()
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report.corpus_table(corpus))
    console.print(report.score_table(Comparison(Scores(0.8, 0.7), Scores(0.9, 0.85), 1, 0, 1.0), 42))
    text = console.export_text()
    for split in corpus.splits().values():
        assert str(sum(e.label == 0 for e in split)) in text
    for figure in ("42 texts", "0.800", "0.700", "0.900", "0.850"):
        assert figure in text
