"""The example that users copy, started as they start it: ``torchrun`` and two processes."""

from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch

from tests.distributed.processes import torchrun


def losses(text):
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", text)]


@pytest.mark.slow
def test_both_ways_train_the_same_adapter(tmp_path):
    found = {}
    for name, flags in {"ddp": [], "fsdp": ["--fsdp"]}.items():
        text = torchrun("examples/train_ddp.py", *flags, "--out", str(tmp_path / name))
        *epochs, again = losses(text)
        assert len(epochs) == 3 and epochs[2] < epochs[0] and again < epochs[0]
        found[name] = safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
    assert found["ddp"].keys() == found["fsdp"].keys()
    for key, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp"][key], tensor, rtol=1e-3, atol=1e-5)
