"""Outputs of adapted layers that the model changes in place, and inputs that it changes after they were read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc.torch_internals import reset_dynamo
from tests.methods.in_fp64 import randomise
from tests.reference import check_against_reference, loss_of, reference_model

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets=["site"])


class Net(nn.Module):
    """A site, and what happens to its input and output: ``halved`` (Longformer's queries) or ``written``."""

    def __init__(self, site, act="halved", broken=False):
        super().__init__()
        self.first, self.site, self.act, self.broken = nn.Linear(6, 6), site, act, broken

    def forward(self, x):
        x = self.first(x) if x.is_floating_point() else x
        h = self.site(x, x, x)[0] if isinstance(self.site, nn.MultiheadAttention) else self.site(x)
        if self.broken:
            torch._dynamo.graph_break()
        if self.act == "halved":
            h /= 2.0
        elif self.act == "halved apart":
            h = h / 2.0
        elif self.act == "written":
            h[..., 1] = h[..., 0].detach() * 3
        elif self.act == "input":  # the layer has read it
            x.mul_(0.5)
            h = h + x
        elif self.act == "input apart":
            h = h + x * 0.5
        return h.sin()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("broken", [False, True])
def test_outputs_are_changed_in_place(backend, broken):
    base = Net(nn.Linear(6, 5), broken=broken)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend=backend)
    for shape in ((4, 6), (2, 4, 6)):
        check_against_reference(model, base, torch.randn(*shape))


@pytest.mark.slow
@pytest.mark.parametrize("act", ["halved", "written"])
@pytest.mark.parametrize("broken", [False, True])
def test_outputs_are_changed_in_place_under_inductor(act, broken):
    base = Net(nn.Linear(6, 5), act, broken)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="inductor")
    for shape in ((4, 6), (2, 4, 6)):
        check_against_reference(model, base, torch.randn(*shape))


METHODS = {
    "LoRA": LORA,
    "LoRA with a bias": adaptc.LoRA(r=3, init="random", lora_bias=True, targets=["site"]),
    "LoRA on two": adaptc.LoRA(r=3, init="random", targets=["first", "site"]),
    "DoRA": adaptc.LoRA(r=3, init="random", dora=True, targets=["site"]),
    "a weight": adaptc.LoRA(r=3, init="random", targets=["site.weight"]),
    "IA3": adaptc.IA3(init="random", targets=["site"]),
    "IA3 on the input": adaptc.IA3(init="random", feedforward=True, targets=["site"]),
    "SSF": adaptc.SSF(targets=["site"]),
    "VeRA": adaptc.VeRA(r=3, targets=["site"], d_initial=0.5),
    "Hydra": adaptc.Hydra(r=3, targets=["site"], init="random"),
    "Bottleneck": adaptc.Bottleneck(r=3, init="random", targets=["site"]),
    "Bottleneck on the input": adaptc.Bottleneck(r=3, init="random", placement="series_in", targets=["site"]),
    "two taps": adaptc.AdaptFormer(r=3, init="random", tap="first", targets=["site"], features=6, dropout=0.0),
    "convolution along the tokens": adaptc.ConvAdapter(r=3, init="random", dropout=0.0, targets=["site"]),
    "trained bias": adaptc.Bias(targets=["site"]),
    "in full": adaptc.Full(targets=["site"]),
    "embedding": adaptc.LoRA(r=3, init="random", targets=["site"]),
    "Conv1d": adaptc.LoRA(r=3, init="random", targets=["site"]),
    "attention": adaptc.LoRA(r=3, init="random", targets=["site"]),
}
SITES = {
    "embedding": lambda: nn.Embedding(9, 6),
    "Conv1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
}


def step(model, x):
    model.zero_grad()
    out = model(x)
    loss_of(out).backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend, broken", [
    pytest.param("eager", True, marks=pytest.mark.slow), pytest.param("eager", False, marks=pytest.mark.long),
    pytest.param("aot_eager", False, marks=pytest.mark.slow), pytest.param("aot_eager", True, marks=pytest.mark.long),
])  # fmt: skip
@pytest.mark.parametrize("name", METHODS)
def test_whatever_adapts_the_layer(name, broken, backend):
    """As the same model that divides into new memory, in fp64."""
    reset_dynamo()
    base = Net(SITES.get(name, lambda: nn.Linear(6, 6))(), broken=broken).double()
    model = adaptc.compile(base, METHODS[name], backend=backend)
    randomise(model)
    x = torch.randint(0, 9, (2, 4)) if name == "embedding" else torch.randn(2, 4, 6, dtype=torch.float64)
    found = []
    for act in ("halved", "halved apart"):
        model.act = act
        found.append(step(model, x))
    torch.testing.assert_close(found[0], found[1])
    assert all(g is not None and g.any() for g in found[0][1].values())


def test_an_input_that_is_changed_after_it_was_read():
    """As autograd: where the backward of the layer needs the values that were there, it says so."""
    model = adaptc.compile(Net(nn.Linear(6, 6), "input", broken=True), LORA, backend="eager")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model(torch.randn(2, 4, 6))).backward()


@pytest.mark.slow
def test_an_input_that_is_changed_after_a_graph_that_keeps_its_values():
    base = Net(nn.Linear(6, 6), "input", broken=True)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    base.act = "input apart"
    check_against_reference(model, base, torch.randn(2, 4, 6))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_then_with(mode):
    base = Net(nn.Linear(6, 5), broken=True).eval()
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    model.act = "none"
    x, factor = torch.randn(2, 4, 6), torch.ones(5, requires_grad=True)
    with mode():
        out = model(x)
    adapter = model.adaptc.sites[0].adapters["default"]
    want = reference_model(base, {"site": [(adapter.lora_A, adapter.lora_B, 2.0)]})
    want.act = "none"
    torch.testing.assert_close(out.double(), want(x.double()).detach(), rtol=1e-5, atol=1e-6)
    if mode is torch.no_grad:
        out.mul_(factor)  # features that are weighted where they are
        out.sum().backward()
        assert factor.grad.any()
