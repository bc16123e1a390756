"""The per-site report and the two pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn

import adaptc
from adaptc.demo.pictures import FROZEN, LORA, draw_loss, draw_sites, smoothed, split_path
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


def _share_drawn(path: Path, color: str) -> float:
    """The share of a picture's pixels that have ``color`` (hexadecimal)."""
    pixels = torch.from_numpy(matplotlib.image.imread(path).copy())[..., :3]
    wanted = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float(((pixels - wanted).abs().amax(-1) < 0.01).float().mean())


@pytest.mark.parametrize("frozen", [0.6, 0.75, 0.9])  # below, between and above LoRA's
def test_the_loss_picture_shows_loss_dev_scores_and_the_frozen_encoder(tmp_path: Path, frozen: float) -> None:
    history = History([3.0 / (i + 1) for i in range(60)], [(30, Scores(0.7, 0.6)), (60, Scores(0.8, 0.7))], kept=60)
    draw_loss(history, Scores(frozen, frozen), tmp_path / "loss.png")
    assert _share_drawn(tmp_path / "loss.png", LORA) > 0.002
    assert _share_drawn(tmp_path / "loss.png", FROZEN) > 0.0005


def _changes(layers: int, roles: tuple[str, ...]) -> list[SiteChange]:
    return [
        SiteChange(f"encoder.layer.{i}.{role}", "lora", 100, 0.01 * (i + 1)) for i in range(layers) for role in roles
    ]


def test_the_site_picture_has_a_row_per_role_and_a_column_per_layer(tmp_path: Path) -> None:
    def size(changes: list[SiteChange]) -> tuple[int, int]:
        draw_sites(changes, tmp_path / "sites.png")
        height, width, _ = matplotlib.image.imread(tmp_path / "sites.png").shape
        return height, width

    few = size(_changes(2, ("query", "value")))
    deep = size(_changes(8, ("query", "value")))
    many = size(_changes(2, ("query", "key", "value", "dense")))
    headed = size([*_changes(2, ("query", "value")), SiteChange("head", "full", 9, 0.02)])
    assert deep[0] == few[0] and deep[1] > few[1]
    assert many[0] > few[0] and many[1] == few[1]
    assert headed[0] > few[0] and headed[1] > few[1]


def test_a_larger_update_is_darker(tmp_path: Path) -> None:
    def brightness(ratio: float) -> float:
        reference = SiteChange("layer.1.query", "lora", 1, 0.1)
        draw_sites([SiteChange("layer.0.query", "lora", 1, ratio), reference], tmp_path / "sites.png")
        return float(matplotlib.image.imread(tmp_path / "sites.png")[..., 0].mean())

    assert brightness(0.01) > brightness(0.05) > brightness(0.09)


@pytest.mark.parametrize(
    ("path", "role", "layer"),
    [
        ("encoder.layer.3.attention.query", "encoder.layer.*.attention.query", 3),
        ("0.linear", "*.linear", 0),
        ("blocks.11", "blocks.*", 11),
        ("layers.2.experts.7", "layers.*.experts.7", 2),
        ("head", "head", None),
        ("conv2.dense1", "conv2.dense1", None),
    ],
)
def test_a_path_is_a_role_and_a_layer(path: str, role: str, layer: int | None) -> None:
    assert split_path(path) == (role, layer)
