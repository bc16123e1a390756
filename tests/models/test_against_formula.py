"""The compiled model computes the formula in fp64, on real classes, however its frames are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import adaptc
from tests.models import hosts
from tests.reference import check_against_reference, check_all_rewritten, check_steps_agree, reference_step, step

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


@pytest.mark.parametrize("host", hosts.slowly(["llama", "gpt2", "bert"], also=["gpt2"]))
def test_every_class_computes_the_formula(host):
    """With the graph as it is after the passes; that AOTAutograd keeps it is tested beside PEFT, on more classes."""
    model = adaptc.compile(hosts.short(host), LORA, backend="eager")
    base = hosts.short(host)
    for train in (True, False):
        model.train(train)
        for rows, length in ((2, 10), (3, 7)):
            batch = hosts.batch(host, rows=rows, length=length)
            want = reference_step(model, base, batch)
            assert len(want[1]) == 2 * len(model.adaptc.sites)
            check_steps_agree(step(model, batch), want)
    check_all_rewritten(model, *hosts.ALL_LINEAR[host])


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.model.layers if hasattr(model, "model") else model.bert.encoder.layer


def break_before_every_block(model: nn.Module) -> None:
    def stop(module, args):
        torch._dynamo.graph_break()

    for block in blocks_of(model):
        block.register_forward_pre_hook(stop)


def compile_every_block(model: nn.Module) -> None:
    for block in blocks_of(model):
        block.compile(backend="aot_eager")


def checkpoint_every_block(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("host, cut", [
    *(pytest.param("llama", cut, marks=pytest.mark.slow)
      for cut in (break_before_every_block, compile_every_block, checkpoint_every_block)),
    *(pytest.param("bert", cut, marks=pytest.mark.slow)
      for cut in (break_before_every_block, compile_every_block, checkpoint_every_block)),
])  # fmt: skip
def test_frames_that_layers_share_give_every_layer_its_own_adapter(host: str, cut: Callable[[nn.Module], None]):
    # transformers sets BERT's problem type in the first call, and a changed config recompiles any model.
    options = {"problem_type": "single_label_classification"} if host == "bert" else {}
    layers = 3 if cut is break_before_every_block else 2  # the first block's graph may be its own
    base = hosts.build(host, train=True, num_hidden_layers=layers, use_cache=False, **options)
    batch = hosts.batch(host)
    whole = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    model = copy.deepcopy(base)
    cut(model)
    model = adaptc.compile(model, LORA, backend="aot_eager")
    model.load_state_dict(whole.state_dict())
    check_against_reference(model, base, batch)
    (want_loss, want), (loss, got) = step(whole, batch), step(model, batch)
    assert loss == want_loss
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name
    metrics = model.adaptc.metrics()
    assert (metrics["eager_sites"], metrics["recompile_limits_hit"], model.adaptc.idle_sites()) == (0, 0, [])
    if cut is break_before_every_block:
        seen = sum(len(graph.sites) for graph in model.adaptc.graphs)
        assert seen < len(model.adaptc.sites), "layers share graphs"
    else:
        assert metrics["graphs"] == whole.adaptc.metrics()["graphs"] == 1
