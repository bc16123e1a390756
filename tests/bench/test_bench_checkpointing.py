"""``--checkpointing``: the same table with every decoder layer computed again in the backward."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch

from bench import train
from bench.agreement import Agreement
from bench.contenders import build_adaptc, build_base, build_peft_compile
from bench.memory import step_memory
from bench.settings import Case, Settings

PLAIN = Settings(layers=2, hidden=64, head_dim=16, vocab=32, tokens=48, rank=3, backend="aot_eager")
SMALL = dataclasses.replace(PLAIN, checkpointing=True)
CASE = Case("fp32", 0.0)


@pytest.mark.slow
def test_blocks_are_computed_again_and_compute_what_they_did() -> None:
    base = build_base(SMALL, CASE)
    agreement = Agreement(base, SMALL, CASE)
    saved = {}
    for name, build in (("peft", build_peft_compile), ("adaptc", build_adaptc)):
        contender = build(base, SMALL, CASE)
        assert agreement.check(contender)["gradient_distance"] < 1e-5
        saved[name] = step_memory(contender, torch.device("cpu"))[1]
    plain = build_adaptc(build_base(PLAIN, CASE), PLAIN, CASE)
    plain.step()
    kept = step_memory(plain, torch.device("cpu"))[1]
    assert saved["adaptc"] <= 1.01 * saved["peft"] < 0.5 * kept


def test_the_flag_is_off_unless_given() -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert parser.parse_args([]).checkpointing is False
    assert parser.parse_args(["--checkpointing"]).checkpointing is True
