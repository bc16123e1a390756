"""The per-site report and the two pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn

import adaptc
from adaptc.demo.pictures import draw_loss, draw_sites, smoothed
from adaptc.demo.sites import SiteChange, site_changes
from adaptc.demo.training import History, Scores


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x))


def test_a_site_reports_the_relative_norm_of_its_update_and_its_parameters() -> None:
    torch.manual_seed(0)
    lora = adaptc.LoRA(r=3, alpha=6, targets=("first",))
    head = adaptc.Rule(match=adaptc.Match(targets=("head",)), train="full")
    model = adaptc.compile(TwoLayers(), adaptc.Plan([lora, head]), backend="eager")
    a, b = torch.randn(3, 6), torch.randn(10, 3)
    shift = torch.randn(3, 10)
    with torch.no_grad():
        model.first.adapters["default"].lora_A.copy_(a)
        model.first.adapters["default"].lora_B.copy_(b)
        trained = dict(model.adaptc.named_parameters())
        next(p for n, p in trained.items() if n.startswith("head.") and p.dim() == 2).add_(shift)
    first, second = site_changes(model.adaptc.sites)
    expected = (2 * b.double() @ a.double()).norm() / model.first.weight.double().norm()
    assert (first.path, first.kind, first.parameters) == ("first", "lora", 3 * 6 + 10 * 3)
    assert first.ratio == pytest.approx(float(expected), rel=1e-6)
    assert (second.path, second.kind, second.parameters) == ("head", "full", 3 * 10 + 3)
    assert second.ratio == pytest.approx(float(shift.norm() / model.head.weight.norm()), rel=1e-5)


def test_smoothing_is_a_trailing_mean() -> None:
    assert smoothed([4.0, 2.0, 0.0, 6.0], 3) == [4.0, 3.0, 2.0, pytest.approx(8 / 3)]


def _is_drawn(path: Path, color: tuple[float, float, float]) -> bool:
    """Whether the picture has pixels of ``color`` (RGB in [0, 1])."""
    pixels = torch.from_numpy(matplotlib.image.imread(path).copy())[..., :3]
    return bool(((pixels - torch.tensor(color)).abs().amax(-1) < 0.01).sum() > 20)


def test_the_loss_picture_shows_loss_dev_accuracy_and_the_frozen_encoder(tmp_path: Path) -> None:
    history = History(losses=[3.0 / (i + 1) for i in range(60)], dev=[(30, Scores(0.7, 0.6)), (60, Scores(0.8, 0.7))])
    draw_loss(history, Scores(0.75, 0.7), tmp_path / "loss.png")
    for hexadecimal in ("1f77b4", "ff7f0e", "7f7f7f"):
        color = tuple(int(hexadecimal[i : i + 2], 16) / 255 for i in (0, 2, 4))
        assert _is_drawn(tmp_path / "loss.png", color), hexadecimal


def test_the_site_picture_grows_with_its_sites_and_colours_roles(tmp_path: Path) -> None:
    def picture(layers: int) -> tuple[int, ...]:
        changes = [
            SiteChange(f"encoder.layer.{i}.{role}", "lora", 100 * (i + 1), 0.1 * (i + 1))
            for i in range(layers)
            for role in ("query", "value")
        ]
        draw_sites(changes, tmp_path / "sites.png")
        return tuple(matplotlib.image.imread(tmp_path / "sites.png").shape)

    short, tall = picture(2), picture(8)
    assert tall[0] > short[0] and tall[1] == short[1]
    for hexadecimal in ("1f77b4", "ff7f0e"):  # one colour for each of the two roles
        color = tuple(int(hexadecimal[i : i + 2], 16) / 255 for i in (0, 2, 4))
        assert _is_drawn(tmp_path / "sites.png", color), hexadecimal
    assert not _is_drawn(tmp_path / "sites.png", (0x2C / 255, 0xA0 / 255, 0x2C / 255))
