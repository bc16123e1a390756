"""What an earlier version wrote gives the output that it gave there, or is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import UnsupportedError

#: A plan, its adapter, the model's state and the whole model; ``values.pt``: an input and the output.
FILES = Path(__file__).parent / "earlier"


def base() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    state = torch.load(FILES / "state_dict.pt")
    model.load_state_dict({name: tensor for name, tensor in state.items() if ".adapters." not in name})
    return model.eval()


def check(model: nn.Module) -> None:
    values = torch.load(FILES / "values.pt")
    torch.testing.assert_close(model(values["x"]), values["y"])


def test_plan_and_state():
    torch.manual_seed(1)
    model = adaptc.compile(base(), FILES / "plan.yaml", backend="eager")
    values = torch.load(FILES / "values.pt")
    assert not torch.allclose(model(values["x"]), values["y"])
    model.load_state_dict(torch.load(FILES / "state_dict.pt"))
    check(model)


def test_adapter_folder():
    model = adaptc.compile(base(), FILES / "adapter", backend="eager")
    check(model)
    assert model.adaptc.records["default"].plan == adaptc.Plan(FILES / "plan.yaml")


def test_pickled_model_is_refused():
    with pytest.raises(UnsupportedError, match=r"earlier version(?s:.*)model\.adaptc\.save\(folder\)"):
        torch.load(FILES / "model.pt", weights_only=False)
