"""The demo's two pictures: the loss curve, and the per-site report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptc.demo.sites import SiteChange
from adaptc.demo.training import History, Scores


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    result = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        result.append(sum(recent) / len(recent))
    return result


def draw_loss(history: History, probe: Scores, path: Path) -> None:
    """Training loss by step, and dev accuracy after each epoch beside the frozen encoder's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="loss of one batch")
    axes.plot(steps, smoothed(history.losses, 20), color="tab:blue", label="mean of the last 20")
    axes.set(xlabel="step", ylabel="training loss (balanced cross-entropy)", title="LoRA training")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.plot(
        [step for step, _ in history.dev],
        [scores.accuracy for _, scores in history.dev],
        color="tab:orange",
        marker="o",
        label="dev accuracy",
    )
    right.axhline(probe.accuracy, color="tab:gray", linestyle="--", label="dev accuracy, frozen encoder")
    right.set_ylabel("dev accuracy")
    handles, labels = axes.get_legend_handles_labels()
    more_handles, more_labels = right.get_legend_handles_labels()
    axes.legend(handles + more_handles, labels + more_labels, loc="center right", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_sites(changes: Sequence[SiteChange], path: Path) -> None:
    """One row per site: relative size of its update, and its trained parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.22 * len(changes)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    roles = list(dict.fromkeys(_role(change.path) for change in changes))
    colors = [f"C{roles.index(_role(change.path)) % 10}" for change in changes]
    rows = range(len(changes))
    left.barh(rows, [change.ratio for change in changes], color=colors)
    left.set_yticks(rows, [change.path for change in changes], fontsize=7, family="monospace")
    left.set_xlabel("norm of the update / norm of the frozen weight")
    left.invert_yaxis()
    left.margins(y=0.01)
    right.barh(rows, [change.parameters for change in changes], color=colors)
    right.set_xlabel("trained parameters")
    figure.suptitle("What was learned, site by site")
    figure.savefig(path, dpi=120)


def _role(path: str) -> str:
    """The path without its layer number: sites of one role share a colour."""
    return ".".join(part for part in path.split(".") if not part.isdigit())
