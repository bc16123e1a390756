"""A small model with several sites, and the graphs of one training step."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import adaptc


class Block(nn.Module):
    """Norm, up, gelu, down; no two widths are equal."""

    def __init__(self, width=6, inner=10):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """``depth`` blocks and a score that is not adapted."""

    def __init__(self, depth=1, classes=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.score = nn.Linear(6, classes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


def adapted(depth=1, dtype=torch.float32, *, targets=("up", "down"), passes=None, backend="aot_eager", verify=False,
            **options):  # fmt: skip
    """(untouched base, adapted copy) whose adapters are not the identity."""
    torch.manual_seed(0)
    base = Model(depth).to(dtype)
    method = adaptc.LoRA(**{"r": 4, "alpha": 8, "init": "random", "targets": list(targets), **options})
    plan = adaptc.Plan([method], passes=passes)
    return base, adaptc.compile(copy.deepcopy(base), plan, backend=backend, verify=verify)


def trained_graph(model, rows=(2, 7), dtype=torch.float32):
    """The one graph of a training step."""
    model(torch.randn(*rows, 6, dtype=dtype)).sum().backward()
    (graph,) = model.adaptc.graphs
    return graph
