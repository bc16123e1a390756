"""LoRA on convolutions: the formula in fp64 and PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import SiteError
from adaptc.methods.lora import conv
from tests.models import hosts
from tests.reference import relative_errors
from tests.sites.life import check_life


def lora(**options):
    return adaptc.LoRA(**{"r": 4, "alpha": 6, "init": "random", "targets": ["0"], **options})


def host(kind, *args, **options):
    with hosts.seeded(2):
        return nn.Sequential(kind(*args, **options), nn.Tanh(), nn.Flatten())


CASES = {
    "2d": (nn.Conv2d, (3, 5, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}, (2, 3, 7, 6)),
    "2d-grouped": (nn.Conv2d, (4, 6, 3), {"groups": 2, "bias": False}, (2, 4, 5, 6)),
    "2d-same": (nn.Conv2d, (3, 5, (2, 3)), {"padding": "same"}, (2, 3, 6, 5)),
    "1d": (nn.Conv1d, (3, 5, 3), {"stride": 2, "padding": 1}, (2, 3, 9)),
}


def weighted(out):
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def model_step(model, x):
    model.zero_grad()
    loss = weighted(model(x))
    loss.backward()
    return loss.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def twin_of(base, model):
    """PEFT's layer, and its model, at the adapter's values."""
    twin = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    layer, adapter = twin.base_model.model[0], model[0].adapters["default"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.lora_A)
        layer.lora_B["default"].weight.copy_(adapter.lora_B)
    return layer, twin


def formula_step(model, base, x):
    """W + s B A in fp64, written out per group and run as one convolution."""
    dtype = torch.float64
    adapter, layer = model[0].adapters["default"], base[0]
    A = adapter.lora_A.detach().to(dtype, copy=True).requires_grad_()
    B = adapter.lora_B.detach().to(dtype, copy=True).requires_grad_()
    convolve = F.conv1d if A.dim() == 3 else F.conv2d
    n, c, r = layer.out_channels // layer.groups, layer.in_channels // layer.groups, A.shape[0] // layer.groups
    weight = torch.zeros(layer.out_channels, layer.in_channels, *A.shape[2:], dtype=dtype)
    for g in range(layer.groups):
        weight[g * n : (g + 1) * n, g * c : (g + 1) * c] = layer.weight.detach()[g * n : (g + 1) * n]
    # The update is dense in the input channels: PEFT's first factor has no groups.
    updates = [
        torch.einsum("nr,rc...->nc...", B[g * n : (g + 1) * n].flatten(1), A[g * r : (g + 1) * r])
        for g in range(layer.groups)
    ]
    weight = weight + adapter.scaling * torch.cat(updates)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    loss = weighted(torch.tanh(convolve(x.to(dtype), weight, bias, layer.stride, layer.padding)).flatten(1))
    loss.backward()
    prefix = "0.adapters.default.lora_"
    return loss.detach().double(), {f"{prefix}A": A.grad.double(), f"{prefix}B": B.grad.double()}


@pytest.mark.parametrize("case", CASES)
def test_computes_the_formula_and_what_peft_computes(case):
    kind, args, options, shape = CASES[case]
    base = host(kind, *args, **options)
    model = adaptc.compile(copy.deepcopy(base), lora(), backend="aot_eager")
    with pytest.warns(UserWarning, match="groups > 1") if "grouped" in case else hosts.seeded(0):
        layer, twin = twin_of(base, model)
    adapter = model[0].adapters["default"]
    for train in (True, False):
        model.train(train)
        x = torch.randn(shape)
        (loss, got), (want_loss, want) = model_step(model, x), formula_step(model, base, x)
        assert abs(float(loss / want_loss) - 1) < 1e-5
        assert max(relative_errors(got, want).values()) < 5e-6
        twin.zero_grad()
        weighted(twin(x)).backward()
        torch.testing.assert_close(adapter.lora_A.grad, layer.lora_A["default"].weight.grad)
        torch.testing.assert_close(adapter.lora_B.grad, layer.lora_B["default"].weight.grad)
    for graph in model.adaptc.graphs:
        assert graph.sites == ["0"] and len(graph.reports[0].result.applied) == 1
    assert (model.adaptc.metrics()["eager_sites"], model.adaptc.idle_sites()) == (0, [])
    if "grouped" not in case:
        change = adapter.delta()
        assert change.shape == base[0].weight.shape and change.any()


def test_dropout_acts_on_the_adapters_input_in_training_only():
    base = host(*CASES["1d"][:1], *CASES["1d"][1], **CASES["1d"][2])
    model = adaptc.compile(copy.deepcopy(base), lora(dropout=0.5), backend="aot_eager").train()
    x = torch.randn(CASES["1d"][3])
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model_step(model.eval(), x)[0], formula_step(model, base, x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["2d", "2d-same", "1d", "2d-grouped"])
def test_lives_as_other_sites_do(case):
    kind, args, options, shape = CASES[case]
    why = "the grouped convolution's weight only those of its group" if "groups" in options else ""
    check_life(lambda: host(kind, *args, **options), lora(), torch.randn(shape), sites=1, unmergeable=why)


def test_autocast_is_as_exact_as_pefts():
    ours, theirs = [], []
    kind, args, options, shape = CASES["2d"]
    for seed in range(6):
        base = host(kind, *args, **options)
        torch.manual_seed(seed)
        model = adaptc.compile(copy.deepcopy(base), lora(), backend="aot_eager")
        layer, twin = twin_of(base, model)
        x = torch.randn(shape)
        _, want = formula_step(model, base, x)
        with torch.autocast("cpu", torch.bfloat16):
            _, got = model_step(model, x)
            weighted(twin(x)).backward()
        peft_got = {f"0.adapters.default.lora_{c}": getattr(layer, f"lora_{c}")["default"].weight.grad for c in "AB"}
        ours += relative_errors(got, want).values()
        theirs += relative_errors({n: g.double() for n, g in peft_got.items()}, want).values()
    assert 1e-4 < sum(ours) <= 1.1 * sum(theirs)


def test_refuses_what_it_would_get_wrong():
    def refused(kind, *args, r=4, **options):
        with pytest.raises(SiteError) as error:
            adaptc.compile(host(kind, *args, **options), lora(r=r), backend="eager")
        return str(error.value)

    assert "its 2 groups do not divide the rank 3" in refused(nn.Conv2d, 4, 4, 3, groups=2, r=3)
    assert 'padding_mode "circular" is not supported' in refused(nn.Conv1d, 4, 4, 3, padding_mode="circular")
    assert "dilation (2, 2) is not supported" in refused(nn.Conv2d, 4, 4, 3, dilation=2)
    assert "Conv3d is not a linear layer" in refused(nn.Conv3d, 4, 4, 3)


@given(st.data())
def test_the_op_computes_its_formula(data):
    x, y, A, B, scale, stride, padding, groups = conv.sample(data.draw)
    got = conv.CONV.overload(x, y, A, B, scale, stride, padding, groups)
    convolve = F.conv1d if A.dim() == 3 else F.conv2d

    def update(x, A, B):
        return convolve(convolve(F.pad(x, padding), A, None, stride), B, None, groups=groups)

    want = y.double() + scale * update(x.double(), A.double(), B.double())
    size = y.double().abs() + scale.abs() * update(x.double().abs(), A.double().abs(), B.double().abs())
    # One rounding each of A, B, h, the product and the sum, and fp32 sums of at most 36 terms.
    bound = 40 * torch.finfo(y.dtype).eps * size + 1e-30
    assert got.dtype == y.dtype and bool(((got.double() - want).abs() <= bound).all())
