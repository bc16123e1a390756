"""DoRA, Hydra and trained tokens under what training asks of any method: other sizes, checkpointing, Inductor."""

from __future__ import annotations

import copy

import pytest

import adaptc
from tests.methods.in_fp64 import randomise
from tests.models import hosts
from tests.reference import check_all_rewritten, check_steps_agree, step

TARGETS = ["q_proj", "k_proj", "down_proj"]
#: Method -> sites in a Llama of one layer.
METHODS = {
    "dora": (lambda: adaptc.LoRA(r=3, dora=True, targets=TARGETS), 3),
    "hydra": (lambda: adaptc.Hydra(r=3, targets=TARGETS), 3),
    "prompt": (lambda: adaptc.Prompt(num_virtual_tokens=3), 1),
    "prefix": (lambda: adaptc.Prefix(num_virtual_tokens=3), 1),
}
#: A prefix lives in the cache, which checkpointing drops: it says so.
CHECKPOINTED = [name for name in METHODS if name != "prefix"]


def build(name, *, backend="aot_eager", **options):
    base = hosts.build("llama", num_hidden_layers=1)
    model = adaptc.compile(copy.deepcopy(base), METHODS[name][0](), backend=backend, **options).train()
    randomise(model, size=0.1)
    return model


def plain(name, model, batch):
    """The same values, op by op, captured for these sizes alone."""
    alone = build(name, backend="eager")
    alone.load_state_dict(model.state_dict())
    return step(alone, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_rows_and_lengths_may_change(name):
    model = build(name, dynamic=True)
    for rows, length in ((2, 10), (3, 10), (4, 13)):
        batch = hosts.batch("llama", rows=rows, length=length)
        check_steps_agree(step(model, batch), plain(name, model, batch))
    assert model.adaptc.metrics()["graphs"] == 1
    check_all_rewritten(model, METHODS[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_blocks_compute_the_same(name):
    model, batch = build(name), hosts.batch("llama")
    want = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_steps_agree(step(model, batch), want)
    check_all_rewritten(model, METHODS[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_inductor_computes_the_same(name):
    model, batch = build(name, backend="inductor"), hosts.batch("llama")
    check_steps_agree(step(model, batch), plain(name, model, batch))
    check_all_rewritten(model, METHODS[name][1])
