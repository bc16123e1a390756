"""Modules whose weight is read past their call: what PEFT refuses is refused, and what can never act is told."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import adaptc
from adaptc import LoRA, Plan
from adaptc.errors import AdaptcWarning, SiteError
from adaptc.plan import bypassed

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4, time_step_rank=2))


def mamba2() -> nn.Module:
    config = transformers.Mamba2Config(**SIZES, num_heads=4, head_dim=8, state_size=4, n_groups=1)
    return transformers.Mamba2ForCausalLM(config)


@pytest.mark.parametrize("build", [mamba, mamba2])
def test_what_peft_refuses_is_refused(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        peft.get_peft_model(build(), peft.LoraConfig(target_modules=["out_proj"]))
    with pytest.raises(SiteError, match=r"out_proj \(Linear\): fast kernels read its weight past its call \(Mamba"):
        Plan(LoRA(targets=["in_proj", "out_proj"])).resolve(build())
    resolution = Plan(LoRA(targets="all-linear")).resolve(build())
    assert "out_proj" not in {site.path.rpartition(".")[2] for site in resolution.sites}
    assert "kernels read its weight" in dict(resolution.left_out)["backbone.layers.0.mixer.out_proj"]


def test_every_model_type_of_the_table_reads_the_weight() -> None:
    """PEFT's table, and that the source of each type says why: else the refusal would not fire."""
    for kind in bypassed.MODEL_TYPES:
        module = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["x"])
        mixers = [cls for name, cls in vars(module).items() if name.endswith(("MambaMixer", "Mixer", "Mamba2Mixer"))]
        assert any(bypassed._reading(cls, "out_proj") for cls in mixers), kind


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.both, self.asked = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.read.weight, self.read.bias)
        y = self.called(y.to(self.asked.weight.dtype)) + x @ self.both.weight
        for layer in (self.both, self.asked):
            y = layer(y)
        return y


def test_what_can_never_act_is_told() -> None:
    found = {name: bypassed.reading(Reads(), name) for name in ("read", "called", "both", "asked")}
    assert found == {
        "read": bypassed.Reading("Reads.forward", called=False), "called": None,
        "both": bypassed.Reading("Reads.forward", called=True), "asked": None,
    }  # fmt: skip
    net = nn.Sequential(Reads(), nn.Linear(3, 2))
    with pytest.warns(AdaptcWarning, match=r"0\.read: Reads\.forward reads its weight and never calls it"):
        model = adaptc.compile(net, LoRA(targets=["read", "called"], init="random"), backend="eager").eval()
    x = torch.randn(2, 3)
    model(x)
    assert model.adaptc.idle_sites() == ["0.read"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptc.compile(Reads(), LoRA(targets=["called", "both", "asked"]), backend="eager")
