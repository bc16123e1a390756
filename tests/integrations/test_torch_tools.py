"""What other tools of torch do with an adapted model: the right thing, or it is refused in our own words."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import adaptc
from adaptc.errors import UnsupportedError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def compiled(model=None, targets=("first",), **options):
    torch.manual_seed(0)
    method = adaptc.LoRA(r=4, alpha=8, init="random", targets=list(targets), **options)
    return adaptc.compile(model or Net().eval(), method, backend="eager")


def formula(model, x, weight=None):
    """The model in fp64, its first layer with the update written out."""
    net, x = copy.deepcopy(model).double(), x.double()
    adapter = net.adaptc.sites[0].adapters["default"]
    weight = (model.first.weight if weight is None else weight).double()
    h = F.linear(x, weight + 2 * adapter.lora_B @ adapter.lora_A, net.first.bias)
    return F.linear(torch.relu(F.layer_norm(h, (8,), net.norm.weight, net.norm.bias)), net.last.weight, net.last.bias)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def check(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_jit_trace_records_the_adapters():
    model = compiled()
    traced = torch.jit.trace(model, X)
    check(traced(2 * X), formula(model, 2 * X))
    blocks = compiled(Blocks().eval(), ["layers.*.0"])
    traced = torch.jit.trace(blocks, X)
    check(traced(2 * X), blocks(2 * X))
    assert blocks.adaptc.captures.epoch.regions


def test_jit_script_is_refused():
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.script cannot read a model with adapters"):
        torch.jit.script(compiled())


def test_export_and_symbolic_trace_have_the_adapters():
    model = compiled()
    want = formula(model, X)
    for strict in (False, True):
        check(torch.export.export(model, (X,), strict=strict).module()(X), want)
    traced = torch.fx.symbolic_trace(model)
    check(traced(X), want)
    traced(X).sum().backward()
    assert all(p.grad is not None for p in model.adaptc.parameters())


@pytest.mark.parametrize("called", [False, True])
def test_quantize_dynamic_of_an_adapted_layer_is_refused_and_of_another_is_right(called):
    model = compiled()
    want = formula(model, X)
    if called:
        model(X)
    with pytest.warns(adaptc.errors.AdaptcWarning, match="first was replaced or removed"):
        served = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        with pytest.raises(UnsupportedError, match=r"was replaced by a torch\.ao\.nn\.quantized\.dynamic"):
            served(X)
    for served in (
        torch.ao.quantization.quantize_dynamic(model, {"last"}),
        torch.ao.quantization.quantize_dynamic(model.adaptc.merge_and_unload(), {nn.Linear}),
    ):
        assert float((served(X).double() - want).norm() / want.norm()) < 0.05


def test_a_normalisation_folded_into_an_adapted_layer_is_refused():
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    net[1].running_var.fill_(3.0)
    model = compiled(net, ["0"])
    with pytest.raises(UnsupportedError, match="0: an adapted Conv1d was replaced by a copy with another weight"):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])(torch.randn(2, 4, 3))
    # What folds nothing in is right.
    model = compiled(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), ["0"])
    with pytest.warns(adaptc.errors.AdaptcWarning, match="0 was replaced or removed"):
        check(torch.ao.quantization.fuse_modules(model, [["0", "1"]])(X), model(X))


@pytest.mark.parametrize("targets", [["0", "2"], ["2"]])
def test_layers_that_have_no_shape_yet_are_refused_and_others_are_adapted(targets):
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8), nn.LazyBatchNorm1d())
    with pytest.raises(UnsupportedError, match=r"0 \(LazyLinear\) has no shape before its first call"):
        compiled(net, targets)
    assert net[2].weight.requires_grad and not hasattr(net, "adaptc")
    with torch.no_grad():
        net(X)
    compiled(net, targets)(X).square().sum().backward()
    assert len(net.adaptc.sites) == len(targets) and all(p.grad is not None for p in net.adaptc.parameters())


def test_weights_that_are_computed_are_read_as_they_are():
    model = compiled()
    model(X)
    nn.utils.parametrizations.weight_norm(model.first)
    with torch.no_grad():
        model.first.parametrizations.weight.original0.mul_(2)
    check(model(X), formula(model, X))
    model = compiled()
    model(X)
    prune.l1_unstructured(model.first, "weight", amount=0.5)
    check(model(X), formula(model, X))


def test_transforms_of_torch_func():
    model = compiled()
    values = {name: p.detach() for name, p in model.named_parameters()}
    trained = {name: values[name] for name, p in model.named_parameters() if p.requires_grad}

    def loss(trained, x):
        return torch.func.functional_call(model, {**values, **trained}, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, X)
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        if name in trained:
            check(per_sample[name].sum(0), p.grad)
    tangent = torch.ones_like(X)
    _, got = torch.func.jvp(model, (X,), (tangent,))
    wide = X.double()
    step = 1e-5
    check(got, (formula(model, wide + step) - formula(model, wide - step)) / (2 * step))
