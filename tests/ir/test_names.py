"""Names of what a graph holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptc.ir.names import Tensor, model_tensor, module_of, module_path

LAYER = "._modules['layers']._modules['0']"
PATHS = {
    f"L['function'].__self__{LAYER}.fc": "layers.0.fc",
    f"L['self']{LAYER}": "layers.0",
    "L['self']": "",
    f"L['block']{LAYER}@1": "layers.0",
    # An object's dict in between, as torch 2.11 writes it.
    f"L['function'].__self__{LAYER}.__dict__['_modules']['adapters'].live[0]": "layers.0.adapters.live.0",
    # The frame of a decorator, as transformers puts one on every forward from 5.24 on: def wrapped(*args, **kwargs).
    f"L['args'][0]{LAYER}._parameters['weight']": "layers.0.weight",
    "L['args'][0]": "",
    "L['args'][0]@1": "",
    # A module whose forward adaptc has replaced.
    "L['function'].__self__.model.forward.args[0].norm": "model.norm",
    "L['self'].forward.args[0].norm": "norm",
}


@pytest.mark.parametrize("raw", PATHS)
def test_a_module_path_is_what_named_modules_says(raw):
    assert module_path(raw) == PATHS[raw]


def decorated(forward):
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapped


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    @decorated
    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def test_paths_of_a_graph_whose_frame_is_a_decorators():
    graphs = []

    def rewrite(gm, inputs):
        graphs.append(gm)
        return gm

    torch.compile(Decorated(), backend=rewrite)(torch.randn(2, 4))
    found = {model_tensor(node) for node in graphs[0].graph.find_nodes(op="placeholder")}
    assert {Tensor("layers.0", "weight"), Tensor("layers.1", "bias")} <= found
    owners = [module_of(node)[0] for node in graphs[0].graph.nodes if "linear" in node.name]
    assert owners == ["layers.0", "layers.1"]
