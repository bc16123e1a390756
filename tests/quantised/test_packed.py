"""Bases whose libraries keep no dense weight, or one of a class of their own: adapted, or refused by name."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_

import adaptc
from adaptc.errors import SiteError, UnsupportedError

LORA = adaptc.LoRA(r=2, init="random", targets=["0"])


def packed(scheme=None):
    """As compressed-tensors leaves a layer until its first forward."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    codes = model[0].weight.detach().to(torch.int8)
    del model[0]._parameters["weight"]
    model[0].register_parameter("weight_packed", nn.Parameter(codes, requires_grad=False))
    if scheme is not None:
        model[0].quantization_scheme = types.SimpleNamespace(format=types.SimpleNamespace(value=scheme))
    return model


@pytest.mark.parametrize(
    "plan",
    [LORA, adaptc.LoRA(r=2, targets="all-linear"), adaptc.LoRA(r=2, dora=True, targets=["0"]),
     adaptc.IA3(targets=["0"]), adaptc.Bottleneck(r=2, targets=["0"]), adaptc.Bias(targets=["0"])],
    ids=["lora", "pattern", "dora", "ia3", "bottleneck", "bias"],
)  # fmt: skip
def test_a_weight_that_is_packed_until_the_first_forward_is_refused_by_name(plan):
    model = packed("pack-quantized")
    with pytest.raises(SiteError) as caught:
        adaptc.compile(model, plan, backend="eager")
    text = str(caught.value)
    assert "0 (Linear)" in text and "compressed-tensors pack-quantized, kept as weight_packed" in text
    assert not hasattr(model, "adaptc") and "adapters" not in model[0]._modules
    if plan is not LORA:
        return
    # Unpacked, it is a layer as any other.
    model[0].weight = nn.Parameter(model[0].weight_packed.float(), requires_grad=False)
    del model[0].weight_packed
    adaptc.compile(model, plan, backend="eager")(torch.randn(2, 8)).sum().backward()


def test_beside_a_packed_layer_others_are_adapted():
    model = adaptc.compile(packed(), adaptc.LoRA(r=2, targets=["1"]), backend="eager")
    assert "Linear, kept as weight_packed" in str(model.adaptc.explain())


@pytest.mark.parametrize("name", ["qweight", "W_q"])
def test_layers_of_other_classes_are_refused_by_name(name):
    class QuantLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer(name, torch.zeros(8, 8, dtype=torch.int32))

    QuantLinear.__module__ = "gptqmodel.nn_modules"
    model = nn.Sequential(QuantLinear(), nn.Linear(8, 8))
    with pytest.raises(SiteError, match=rf"QuantLinear has no weight \(gptqmodel QuantLinear, kept as {name}\)"):
        adaptc.compile(model, LORA, backend="eager")


def quanto(frozen):
    """As ``optimum.quanto.quantize`` leaves a layer, and as ``freeze`` does."""

    class QLinear(nn.Linear):
        weight_qtype = types.SimpleNamespace(name="qint8")

    class WeightQBytesTensor(nn.Parameter):
        pass

    QLinear.__module__ = "optimum.quanto.nn.qlinear"
    WeightQBytesTensor.__module__ = "optimum.quanto.tensor.weights.qbytes"
    model = nn.Sequential(QLinear(8, 8), nn.Linear(8, 8))
    if frozen:
        model[0].weight = WeightQBytesTensor(model[0].weight.detach(), requires_grad=False)
    return model


@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_of_quanto_trains_and_is_not_merged(frozen):
    model = adaptc.compile(quanto(frozen), LORA, backend="eager")
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad.any() for p in model.adaptc.parameters())
    text = "quanto qint8" if frozen else "quanto qint8, not frozen"
    assert text in str(model.adaptc.explain())
    with pytest.raises(UnsupportedError, match=f"found  {text}: "):
        model.merge_and_unload()
    with pytest.raises(SiteError, match=rf"dora needs the values of the weight, and this one is quantised \({text}\)"):
        adaptc.compile(quanto(frozen), adaptc.LoRA(dora=True, targets=["0"]), backend="eager")


def test_training_over_opaque_int4_is_refused_and_inference_is_not():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    base = [layer.weight.detach().clone() for layer in model]
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    model = adaptc.compile(model, adaptc.LoRA(r=2, init="random", targets=["0", "1"]), backend="eager")
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"torchao's opaque codes .Int4OpaqueTensor. has no backward"):
        model(x)
    with torch.no_grad():
        got = model.eval()(x)
    want = x.double()
    for weight, layer in zip(base, model, strict=True):
        want = want @ (weight.double() + layer.adapters["default"].delta()).T + layer.bias.double()
    assert (got - want).norm() / want.norm() < 0.2  # 4 bits
