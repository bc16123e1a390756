"""Deliberately wrong passes: each is detected, undone under verify=True, and raised under verify="raise"."""

from __future__ import annotations

import re

import pytest
import torch

from adaptc.errors import AdaptcWarning, VerifyError
from adaptc.ir.validate import validator
from adaptc.passes.contract import Context
from adaptc.passes.manager import Pipeline, get
from tests.ir.wrong_passes import WRONG, adapted, around, capture, wrong


def run_pipeline(model, x, pipeline, mode):
    gm, inputs, sites = capture(model, x)
    check = validator(mode, inputs)
    return pipeline.run(gm, "dynamo", Context(sites=sites, record=True), validate=check)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pass_is_undone_and_reported(name):
    run, dtype, message = WRONG[name]
    _, model = adapted(dtype=dtype)
    with pytest.warns(AdaptcWarning, match=f"after pass {name}, at .*the pass was undone.*skip: \\[{name}\\]"):
        gm, reports = run_pipeline(model, torch.randn(4, 6, dtype=dtype), around(wrong(name, run)), True)
    by_name = {r.name: r for r in reports}
    assert list(by_name) == ["insert", name, "canonicalise"]
    undone = by_name[name].rolled_back
    assert undone.startswith(f"VerifyError after pass {name}, at ")
    assert message in undone
    assert by_name["insert"].rolled_back is None and by_name["canonicalise"].rolled_back is None
    # What is left is what the right passes make without it.
    (alone, _) = run_pipeline(model, torch.randn(4, 6, dtype=dtype), Pipeline([get("insert"), get("canonicalise")]), False)  # noqa: E501
    assert gm.code == alone.code


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pass_raises_on_request(name):
    run, dtype, message = WRONG[name]
    _, model = adapted(dtype=dtype)
    with pytest.raises(VerifyError, match=re.escape(message)) as caught:
        run_pipeline(model, torch.randn(4, 6, dtype=dtype), around(wrong(name, run)), "raise")
    assert caught.value.headline.startswith(f"VerifyError after pass {name}, at ")
    assert {"expected", "found"} <= caught.value.facts.keys()
