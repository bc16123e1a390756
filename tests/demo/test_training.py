"""The demo's two contenders, against scikit-learn and formulas written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from adaptc.demo import training
from adaptc.demo.model import SentenceClassifier, TokenizedTexts, tokenize
from adaptc.demo.training import Settings, class_weights, fit_probe, run_over, score, train_adapter
from tests.demo import tiny


class BagOfTokens(nn.Module):
    """The smallest classifier with the demo's call."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, classes)
        self.modes: list[bool] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return (self.table(input_ids) * attention_mask[..., None]).sum(1)


def _separable(count: int) -> TokenizedTexts:
    rows = tuple((5 + i % 3, 10 + i % 7) for i in range(count))
    return TokenizedTexts(rows, torch.tensor([i % 3 for i in range(count)]))


def test_scores_by_hand() -> None:
    found = score(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    assert found.accuracy == 0.75
    # class 0: precision 1, recall 2/3, F1 4/5; class 1: precision 1/2, recall 1, F1 2/3
    assert found.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_run_over_returns_rows_in_the_order_of_the_texts() -> None:
    lengths = [3, 20, 5, 24, 1, 16, 17] * 9
    texts = TokenizedTexts(tuple((7,) * n for n in lengths), torch.zeros(len(lengths), dtype=torch.long))
    found = run_over(lambda ids, mask: mask.sum(1, keepdim=True).float(), texts, 8)
    assert found[:, 0].tolist() == lengths


def test_run_over_refuses_an_empty_split() -> None:
    with pytest.raises(ValueError, match="there are no texts"):
        run_over(lambda ids, mask: ids, TokenizedTexts((), torch.zeros(0)), 8)


def test_class_weights_are_scikit_learns_balanced_ones() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(class_weights(labels, 3).numpy(), expected, rtol=1e-6)


def test_the_probe_is_the_logistic_regression_that_dev_prefers() -> None:
    encoder, tokenizer = tiny.encoder()
    corpus = tiny.corpus()
    train, dev = tokenize(tokenizer, corpus.train), tokenize(tokenizer, corpus.dev)
    model = SentenceClassifier(encoder, 2)
    strength, found = fit_probe(model, train, dev, 16)
    inputs = run_over(model.embed, train, 16).numpy()
    dev_inputs = run_over(model.embed, dev, 16)
    by_strength = {}
    for c in training.PROBE_STRENGTHS:
        probe = LogisticRegression(C=c, max_iter=3000, class_weight="balanced")
        probe.fit(inputs, train.labels.numpy())
        by_strength[c] = score(torch.tensor(probe.predict(dev_inputs.numpy())), dev.labels)
    assert found.macro_f1 == max(s.macro_f1 for s in by_strength.values())
    assert found == by_strength[strength]
    assert training.predict_scores(model, dev, 16) == found


def test_training_learns_what_is_learnable_and_reports_every_step() -> None:
    torch.manual_seed(0)
    train, dev = _separable(90), _separable(21)
    model = BagOfTokens(20, 3)
    heard = []
    history = train_adapter(
        model, list(model.parameters()), train, dev, Settings(epochs=6, learning_rate=0.1, clip_norm=10.0),
        seed=0, classes=3, on_step=lambda loss, scores: heard.append((loss, scores)),
    )  # fmt: skip
    steps = 6 * math.ceil(90 / 16)
    assert len(history.losses) == len(heard) == steps
    assert [loss for loss, _ in heard] == history.losses
    assert [step for step, _ in history.dev] == [6 * e for e in range(7)]
    assert [scores for _, scores in heard if scores is not None] == [s for _, s in history.dev[1:]]
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert history.dev[-1][1].accuracy == 1.0


def test_steps_run_in_training_mode_and_dev_in_evaluation_mode() -> None:
    model = BagOfTokens(20, 3)
    train_adapter(model, list(model.parameters()), _separable(32), _separable(9), Settings(epochs=2), seed=0, classes=3)
    assert model.modes == [False, True, True, False, True, True, False]


@pytest.mark.parametrize(("macro_f1", "kept"), [((0.9, 0.1, 0.5, 0.2), 4), ((0.9, 0.1, 0.2, 0.3), 6)])
def test_the_weights_of_the_epoch_that_dev_prefers_are_kept(
    monkeypatch: pytest.MonkeyPatch, macro_f1: tuple[float, ...], kept: int
) -> None:
    """The start, which dev may like best, is the frozen encoder's and no choice."""
    model = BagOfTokens(20, 3)
    tables: list[torch.Tensor] = []

    def scored(*_: object) -> training.Scores:
        tables.append(model.table.weight.detach().clone())
        return training.Scores(0.5, macro_f1[len(tables) - 1])

    monkeypatch.setattr(training, "predict_scores", scored)
    settings = Settings(epochs=3)
    history = train_adapter(model, list(model.parameters()), _separable(32), _separable(9), settings, seed=0, classes=3)
    assert history.kept == kept
    assert torch.equal(model.table.weight, tables[kept // 2])
    assert len({float(t.sum()) for t in tables}) == 4  # else this test says nothing


def test_the_first_loss_is_the_weighted_cross_entropy_of_the_first_batch() -> None:
    train = TokenizedTexts(((5,),) * 12 + ((6,),) * 4, torch.tensor([0] * 12 + [1] * 4))
    model = BagOfTokens(20, 2)
    table = model.table.weight.detach().double().clone()
    history = train_adapter(model, list(model.parameters()), train, train, Settings(epochs=1), seed=0, classes=2)
    log_probability = table.log_softmax(1)
    weights = torch.tensor([16 / (2 * 12), 16 / (2 * 4)], dtype=torch.float64)
    total = weights[0] * 12 * log_probability[5, 0] + weights[1] * 4 * log_probability[6, 1]
    expected = -total / (12 * weights[0] + 4 * weights[1])
    assert history.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_same_seed_gives_the_same_losses() -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(0)
        model = BagOfTokens(20, 3)
        texts = _separable(60)
        settings = Settings(epochs=2)
        return train_adapter(model, list(model.parameters()), texts, texts, settings, seed=seed, classes=3).losses

    assert losses(3) == losses(3) != losses(4)


def test_the_rate_rises_then_falls_to_zero() -> None:
    rate = training._warmup_and_decay(100, 0.1)
    assert [rate(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(55) == pytest.approx(0.5)
    assert rate(100) == 0.0
