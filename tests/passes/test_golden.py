"""The text of a small bf16 model's graph after every pass, against ``golden/<stage>.txt``.

To write the files anew, and then read their diff like code: ADAPTC_REFRESH_GOLDEN=1 pytest tests/passes/test_golden.py
"""

from __future__ import annotations

import os
import pathlib
import re

import pytest
import torch

from adaptc.codegen.cpp import takes
from adaptc.codegen.ops import lora_split
from adaptc.passes import widen
from adaptc.torch_internals import TORCH
from tests.passes.models import adapted, trained_graph

FOLDER = pathlib.Path(__file__).parent / "golden"
#: Passes that change nothing here.
IDLE = ("lift_no_grad", "seed_dropout", "reassociate", "library")
STAGES = ("captured", "insert", "canonicalise", "joint", "share", "fuse", "lower", "widen")
#: The order of AOTAutograd's nodes and Dynamo's names differ between versions; the files are of this one.
VERSION = (2, 13)


@pytest.mark.skipif(TORCH.release[:2] != VERSION, reason="the files are of torch 2.13")
@pytest.mark.parametrize("stage", STAGES)
def test_graph_text(stage, monkeypatch):
    for module in (takes, lora_split, widen):
        monkeypatch.setattr(module, "cpu_emulates", lambda dtype: stage == "widen" and dtype == torch.bfloat16)
    monkeypatch.setattr(takes, "has_avx512_bf16", lambda: False)
    _, model = adapted(dtype=torch.bfloat16)
    graph = trained_graph(model, dtype=torch.bfloat16)
    assert tuple(s for s in graph.stages if s not in IDLE) == STAGES
    assert graph.stage("lift_no_grad") == graph.stage("insert")
    assert graph.stage("seed_dropout") == graph.stage("canonicalise")
    assert graph.stage("reassociate") == graph.stage("joint")
    assert graph.stage("library") == graph.stage("widen")
    # Between the gradients stands a None for every other input; in which order inputs come is of no interest.
    text = re.sub(r"None x \d+", "None", graph.stage(stage).rstrip() + "\n")
    path = FOLDER / f"{stage}.txt"
    if os.environ.get("ADAPTC_REFRESH_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
