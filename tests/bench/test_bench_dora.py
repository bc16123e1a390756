"""``--dora``: the same table for DoRA, with the same refusal of what computes something else."""

from __future__ import annotations

import argparse

import pytest
import torch

from bench import train
from bench.agreement import Agreement
from bench.contenders import Contender, build_adaptc, build_base
from bench.errors import DisagreementError
from bench.settings import Case, Settings

SMALL = Settings(layers=1, hidden=32, head_dim=16, vocab=32, tokens=12, rank=3, backend="aot_eager", dora=True)
CASE = Case("fp32", 0.0)


@pytest.mark.slow
def test_adaptc_computes_what_peft_computes_and_a_changed_magnitude_is_refused() -> None:
    base = build_base(SMALL, CASE)
    agreement = Agreement(base, SMALL, CASE)
    contender: Contender = build_adaptc(base, SMALL, CASE)
    found = agreement.check(contender)
    assert 0 <= found["gradient_distance"] <= found["gradient_bound"] < 1e-5
    magnitudes = [name for name in contender.adapter if name.endswith("lora_magnitude")]
    assert len(magnitudes) == 7 and len(contender.adapter) == 21
    with torch.no_grad():
        contender.adapter[magnitudes[2]].mul_(1.05)
    with pytest.raises(DisagreementError, match=r"adaptc \(fp32, p = 0\): loss"):
        agreement.check(contender)


def test_the_flag_is_off_unless_given() -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert parser.parse_args([]).dora is False
    assert parser.parse_args(["--dora"]).dora is True
