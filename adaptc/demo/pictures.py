"""The demo's two pictures: the loss curve, and the per-site report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptc.demo.sites import SiteChange
from adaptc.demo.training import History, Scores

LORA, FROZEN, FAINT = "#1f77b4", "#7f7f7f", "#c6dbef"


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    result = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        result.append(sum(recent) / len(recent))
    return result


def draw_loss(history: History, frozen: Scores, path: Path) -> None:
    """Training loss by step, and beside it the dev scores after each epoch against the frozen encoder's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, accuracy, macro = figure.subplots(1, 3, width_ratios=[1.6, 1, 1])
    steps = range(1, len(history.losses) + 1)
    loss.plot(steps, history.losses, color=FAINT, linewidth=0.8, label="loss of one batch")
    loss.plot(steps, smoothed(history.losses, 20), color=LORA, label="loss, mean of 20 batches")
    loss.set(xlabel="step", title="Training loss (balanced cross-entropy)", ylim=(0, None))
    _draw_dev(accuracy, history, "accuracy", frozen.accuracy)
    _draw_dev(macro, history, "macro_f1", frozen.macro_f1)
    accuracy.set_title("Accuracy on dev")
    macro.set_title("Macro-F1 on dev")
    for axes in (loss, accuracy, macro):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    handles = [*loss.get_lines(), *accuracy.get_lines()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)


def _draw_dev(axes: Any, history: History, name: str, frozen: float) -> None:
    values = [getattr(scores, name) for _, scores in history.dev]
    axes.axhline(frozen, color=FROZEN, linestyle="--", label="frozen encoder + head")
    axes.plot([step for step, _ in history.dev], values, color=LORA, marker="o", label="LoRA + head")
    kept = dict(history.dev).get(history.kept)
    if kept is not None:
        axes.plot(
            history.kept,
            getattr(kept, name),
            "o",
            markersize=13,
            markerfacecolor="none",
            color=LORA,
            label="LoRA + head, kept",
        )
    low, high = min([frozen, *values]), max([frozen, *values])
    margin = max(0.01, 0.25 * (high - low))
    axes.set(xlabel="step", ylim=(low - margin, high + margin))


def draw_sites(changes: Sequence[SiteChange], path: Path) -> None:
    """A map of the updates: one row per role, one column per layer, and what each role trains."""
    from matplotlib.figure import Figure

    roles = list(dict.fromkeys(split_path(change.path)[0] for change in changes))
    layers = sorted({layer for change in changes if (layer := split_path(change.path)[1]) is not None})
    columns: list[int | None] = [*layers]
    if any(split_path(change.path)[1] is None for change in changes):
        columns.append(None)  # sites outside the layers
    grid = [[float("nan")] * len(columns) for _ in roles]
    trained = dict.fromkeys(roles, 0)
    for change in changes:
        role, layer = split_path(change.path)
        grid[roles.index(role)][columns.index(layer)] = 100 * change.ratio
        trained[role] += change.parameters
    figure = Figure(figsize=(5.4 + 0.72 * len(columns), 2.1 + 0.42 * len(roles)), layout="constrained")
    axes = figure.add_subplot()
    highest = max((100 * change.ratio for change in changes), default=1.0)
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.15 * highest, aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:  # not NaN
                color = "white" if value > 0.7 * highest else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_yticks(range(len(roles)), roles, family="monospace", fontsize=9)
    axes.set_xticks(range(len(columns)), ["" if column is None else str(column) for column in columns])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(roles)), [f"{trained[role]:,}" for role in roles], fontsize=9)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    axes.text(1.01, 1.01, "trained parameters", transform=axes.transAxes, va="bottom", fontsize=9)
    figure.suptitle("What was learned: norm of each update, % of the frozen weight's norm")
    figure.savefig(path, dpi=120)


def split_path(path: str) -> tuple[str, int | None]:
    """(role, layer): the path with ``*`` for its first number, and that number; sites of one role share a row."""
    match = re.search(r"(?<![^.])\d+(?![^.])", path)
    if match is None:
        return path, None
    return f"{path[: match.start()]}*{path[match.end() :]}", int(match[0])
