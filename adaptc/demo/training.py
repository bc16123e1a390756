"""The two contenders of the demo: a head on the frozen encoder, and LoRA trained through adaptc."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptc.demo.model import SentenceClassifier, TokenizedTexts, batches

#: Inverse L2 strengths tried for the frozen encoder's head; the dev split decides.
PROBE_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the LoRA training uses; its batch size serves evaluation too, so that there is one shape to compile."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 16
    epochs: int = 5
    warmup_share: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scores:
    accuracy: float
    macro_f1: float


@dataclasses.dataclass
class History:
    """One loss per step; the dev scores with the step after which they were taken, 0 for before the first.

    ``kept`` is the step whose weights the model has in the end; ``first_step_s`` runs until the first step is
    done, what it compiles included, ``total_s`` to the end.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    dev: list[tuple[int, Scores]] = dataclasses.field(default_factory=list)
    kept: int = 0
    first_step_s: float = 0.0
    total_s: float = 0.0


def score(predicted: Tensor, labels: Tensor) -> Scores:
    """Accuracy, and F1 averaged over the classes that occur in either argument."""
    from sklearn.metrics import accuracy_score, f1_score

    truth, guess = labels.numpy(), predicted.numpy()
    macro = f1_score(truth, guess, average="macro", zero_division=0.0)
    return Scores(float(accuracy_score(truth, guess)), float(macro))


def run_over(function: Callable[[Tensor, Tensor], Tensor], texts: TokenizedTexts, size: int) -> Tensor:
    """``function``'s rows for all texts, in their order, in batches of ``size``, without gradients."""
    result: Tensor | None = None
    with torch.no_grad():
        for batch in batches(texts, size):
            rows = function(batch.input_ids, batch.attention_mask)[: batch.count]
            if result is None:
                result = rows.new_empty(len(texts), rows.shape[1])
            result[batch.indices[: batch.count]] = rows
    if result is None:
        raise ValueError("run_over: there are no texts")
    return result


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights that give every class the same share of the loss (scikit-learn's "balanced")."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes).float())


def fit_probe(model: SentenceClassifier, train: TokenizedTexts, dev: TokenizedTexts, size: int) -> tuple[float, Scores]:
    """Fit the head on the frozen encoder's embeddings; returns the strength chosen and its dev scores.

    Logistic regression with balanced classes: convex, so this baseline is as good as its L2 strength,
    and that is chosen by macro-F1 on dev. The encoder runs once.
    """
    model.eval()
    inputs, dev_inputs = run_over(model.embed, train, size), run_over(model.embed, dev, size)
    best: tuple[float, Scores] | None = None
    for strength in PROBE_STRENGTHS:
        weight, bias = _logistic_regression(inputs, train.labels, strength)
        found = score(F.linear(dev_inputs, weight, bias).argmax(1), dev.labels)
        if best is None or found.macro_f1 > best[1].macro_f1:
            best = (strength, found)
            with torch.no_grad():
                model.head.weight.copy_(weight)
                model.head.bias.copy_(bias)
    if best is None:
        raise ValueError("fit_probe: no strength to try")
    return best


def _logistic_regression(inputs: Tensor, labels: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight (classes, hidden) and bias (classes,) for a softmax."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    probe = LogisticRegression(C=strength, max_iter=3000, class_weight="balanced")
    with threadpool_limits(1, user_api="blas"):  # products this small take longer on several threads
        probe.fit(inputs.numpy(), labels.numpy())
    weight, bias = torch.tensor(probe.coef_), torch.tensor(probe.intercept_)
    if len(bias) == 1:  # two classes come as one row: the difference of the two that softmax needs
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight.float(), bias.float()


def train_adapter(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    train: TokenizedTexts,
    dev: TokenizedTexts,
    settings: Settings,
    *,
    seed: int,
    classes: int,
    on_step: Callable[[float, Scores | None], None] = lambda loss, dev: None,
) -> History:
    """Train ``parameters`` of ``model`` with AdamW, a linear warm-up and decay, and balanced cross-entropy.

    In the end they have the values of the epoch of the best macro-F1 on dev, as the frozen encoder's head has
    the strength that dev prefers.  ``on_step`` is told the loss, and the dev scores where an epoch ends.
    """
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps_per_epoch = math.ceil(len(train) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _warmup_and_decay(steps_per_epoch * settings.epochs, settings.warmup_share)
    )
    weights = class_weights(train.labels, classes)
    history = History()
    best: tuple[float, list[Tensor]] | None = None
    started = time.perf_counter()
    history.dev.append((0, predict_scores(model, dev, settings.batch_size)))
    for _ in range(settings.epochs):
        model.train()
        for position, batch in enumerate(batches(train, settings.batch_size, order)):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            loss = F.cross_entropy(logits, train.labels[batch.indices], weight=weights)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            schedule.step()
            history.losses.append(loss.item())
            if len(history.losses) == 1:
                history.first_step_s = time.perf_counter() - started
            scores = None
            if position == steps_per_epoch - 1:
                scores = predict_scores(model, dev, settings.batch_size)
                history.dev.append((len(history.losses), scores))
                if best is None or scores.macro_f1 > best[0]:
                    best = (scores.macro_f1, [p.detach().clone() for p in parameters])
                    history.kept = len(history.losses)
            on_step(history.losses[-1], scores)
    if best is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, best[1], strict=True):
                parameter.copy_(value)
    history.total_s = time.perf_counter() - started
    return history


def logits_of(model: nn.Module, texts: TokenizedTexts, size: int) -> Tensor:
    """(texts, classes), in evaluation mode, in batches of ``size``."""
    model.eval()
    return run_over(lambda ids, mask: model(input_ids=ids, attention_mask=mask), texts, size)


def predict_scores(model: nn.Module, texts: TokenizedTexts, size: int) -> Scores:
    return score(logits_of(model, texts, size).argmax(1), texts.labels)


def _warmup_and_decay(steps: int, warmup_share: float) -> Callable[[int], float]:
    warmup = max(1, round(steps * warmup_share))
    return lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
