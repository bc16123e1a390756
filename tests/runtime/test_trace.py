"""Random switches, merges, batches, files, copies, casts and failures in any order: see ``tests.runtime.trace``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from adaptc.methods.rows import Rows
from adaptc.runtime.weights import patch
from tests.runtime.trace import LIVES, LlamaLife

#: What a long run is to have done; what a short one does depends on the release of hypothesis.
DONE = {
    "switch", "merge", "failed merge", "interrupted unmerge", "call", "failed call", "batch", "add", "remove", "write",
    "write base", "load", "refused load", "cast", "copy", "load_state_dict", "backward", "refused merge",
}  # fmt: skip


def run(life, examples, steps, *, shrinks=True):
    """Lives of so many steps, the same ones each time."""
    life.counts = {}
    phases = (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), phases=phases, print_blob=False,
            report_multiple_bugs=False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("life", LIVES)
def test_random_operations_leave_the_base_as_it_was(life):
    run(life, examples=6, steps=16)
    assert len(life.counts) > 5


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("life", LIVES)
def test_a_thousand_random_operations_leave_the_base_as_it_was(life):
    run(life, examples=40, steps=30)
    assert set(life.counts) >= DONE, DONE - set(life.counts)


def put_back_off(target, kept, own=patch.put_back):
    own(target, kept)
    if target.dim() == 2:
        with torch.no_grad():
            target.view(torch.int16)[0, 1] ^= 1


def read_as_it_is(self, module, state, prefix, metadata):
    pass


def put_everywhere(self, number, new, old):
    return new


def keep_in_its_dtype(kept, now):
    return kept.to(now.device, torch.bfloat16).to(now.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("where, name, wrong", [
    (patch, "put_back", put_back_off),
    (patch, "as_now", keep_in_its_dtype),
    (patch.BaseState, "__call__", read_as_it_is),
    (Rows, "put", put_everywhere),
])  # fmt: skip
def test_the_trace_sees_what_is_wrong(monkeypatch, where, name, wrong):
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        run(LlamaLife, examples=40, steps=30, shrinks=False)
