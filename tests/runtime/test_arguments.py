"""What an adapter reads of a layer with several tensor arguments: the first of its signature, however it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from tests.methods.in_fp64 import randomise


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden_states, residual=None, *, scale=1.0):
        return self.linear(hidden_states) * scale + residual


class Chosen(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, ids=None, embeds=None, mask=None):
        return self.linear(embeds) + mask


class Net(nn.Module):
    def __init__(self, site, calls):
        super().__init__()
        self.site, self.calls, self.way = site, calls, 0

    def forward(self, x, other):
        out = self.calls[self.way](self.site, x, other)
        return out[0] if isinstance(out, tuple) else out


BESIDE = adaptc.Bottleneck(r=3, init="random", placement="parallel", features=6, targets=["site"])
BEFORE = adaptc.Bottleneck(r=3, init="random", placement="series_in", features=6, targets=["site"])
CASES = {
    "block": (Block, [
        lambda m, x, o: m(x, o),
        lambda m, x, o: m(x, residual=o),
        lambda m, x, o: m(hidden_states=x, residual=o),
        lambda m, x, o: m(residual=o, hidden_states=x),
        lambda m, x, o: m(scale=1.0, residual=o, hidden_states=x),
    ]),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), [
        lambda m, x, o: m(x, o, o),
        lambda m, x, o: m(query=x, key=o, value=o),
        lambda m, x, o: m(value=o, key=o, query=x),
        lambda m, x, o: m(need_weights=True, key=o, value=o, query=x),
    ]),
    "bilinear": (lambda: nn.Bilinear(6, 6, 6), [
        lambda m, x, o: m(x, o), lambda m, x, o: m(input2=o, input1=x)
    ]),
    "an argument that is None": (Chosen, [
        lambda m, x, o: m(embeds=x, mask=o), lambda m, x, o: m(mask=o, embeds=x, ids=None)
    ]),
}  # fmt: skip


@pytest.mark.parametrize("method", [BESIDE, BEFORE], ids=["beside", "before"])
@pytest.mark.parametrize("name", CASES)
def test_the_first_of_the_signature_is_read(name, method):
    make, calls = CASES[name]
    model = adaptc.compile(Net(make(), calls).double(), method, backend="eager")
    randomise(model)
    x, other = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    wrong = model(other, x)
    copies = [model, copy.deepcopy(model)] if name == "block" else [model]
    with torch.compiler.set_stance("force_eager"):
        want = model(x, other)
        assert not torch.allclose(wrong, want)
        for one in copies:
            for one.way in range(len(calls)):
                torch.testing.assert_close(one(x, other), want)
    model.way = len(calls) - 1
    torch.testing.assert_close(model(x, other), want)  # captured


@pytest.mark.parametrize("way", range(4))
def test_a_tap_reads_the_first_of_the_signature(way):
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.mlp, self.way = Block(), nn.Linear(6, 6), 0

        def forward(self, x, other):
            return self.mlp(CASES["block"][1][self.way](self.block, x, other))

    plan = adaptc.AdaptFormer(r=3, init="random", tap="block", dropout=0.0, targets=["mlp"])
    model = adaptc.compile(Tapped().double(), plan, backend="eager")
    randomise(model)
    x, other = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):
        want = model(x, other)
        model.way = way
        torch.testing.assert_close(model(x, other), want)
