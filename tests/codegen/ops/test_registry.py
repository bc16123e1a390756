"""The rows of the registry: reached from the start, and the same outside a graph as in one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.codegen.cpp import takes
from adaptc.codegen.ops import registry
from adaptc.codegen.ops.row import Kernel, Row, chosen
from adaptc.ir import dialect
from adaptc.ir.sites import dialect_nodes
from adaptc.passes.contract import Context
from adaptc.passes.lower import lower
from tests.codegen.ops.test_lowering import graph_of
from tests.ir.formulas import outputs

KERNELS = [name for name, row in registry.ROWS.items() if row.kernels]


def test_every_row_is_reached_before_the_first_key_is_made():
    program = """
from adaptc.passes.manager import Pipeline
from adaptc.codegen.ops import registry
from adaptc.ir import dialect
names, first = list(registry.ROWS), registry.fingerprint()
assert all(dialect.get(name).name == name for name in names), "of an op that there is"
assert dialect.kernel_for is registry.kernel_for
Pipeline.from_options().uuid()
assert names == list(registry.ROWS) and first == registry.fingerprint()
"""
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data())
@settings(max_examples=30)
def test_an_op_that_stays_gives_the_same_bits_outside_a_graph_as_in_one(name, data):
    args = dialect.get(name).sample(data.draw)
    gm, tensors = graph_of(name, args)
    lower(gm, Context())
    if not dialect_nodes(gm):
        return
    for got, want in zip(gm(*tensors), outputs(dialect.get(name).overload(*args)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data())
@settings(max_examples=30)
def test_what_no_kernel_takes_runs_as_its_body(name, data):
    args = dialect.get(name).sample(data.draw)
    device = next(t.device for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor))
    run = registry.kernel_for(name, device, *args)
    assert registry.kernel_for(name, torch.device("meta"), *args) is None
    python = getattr(torch.ops.adaptc_python, name)
    with torch.no_grad():
        want = outputs((run or dialect.get(name).body)(*args))
    for got, one in zip(outputs(python(*args)), want, strict=True):
        assert torch.equal(got, one)


def test_the_first_kernel_that_takes_the_arguments_and_is_there_is_chosen():
    def kernel(takes, there):
        return Kernel(run=lambda x: x, takes=lambda x: takes, platform=lambda device: there)

    kernels = (kernel(False, True), kernel(True, False), kernel(True, True), kernel(True, True))
    x = torch.ones(1)
    assert chosen(kernels, x.device, x) is kernels[2]
    assert chosen(kernels[:2], x.device, x) is None


def test_a_kernel_may_have_a_cost_of_its_own(monkeypatch):
    def cost(*args):
        return dialect.Cost(flops=7)

    def row(there):
        return Row(kernels=(Kernel(lambda x: x, lambda *args: True, lambda device: there, cost),))

    for there, want in ((True, cost), (False, dialect.get("dora_row_norm").cost)):
        monkeypatch.setitem(registry.ROWS, "dora_row_norm", row(there))
        assert registry.cost_of("dora_row_norm", torch.device("cpu")) is want


def test_norms_in_bf16_read_the_weight_as_it_is_and_cost_less():
    W, A, B = torch.empty(300, 200).bfloat16(), torch.empty(8, 200), torch.empty(300, 8)
    args = W, A, B, torch.ones(1), False
    plain, own = dialect.get("dora_row_norm").cost(*args), registry.ROWS["dora_row_norm"].kernels[-1].cost(*args)
    assert (plain.read - own.read, plain.written - own.written) == (4 * W.numel(), 4 * W.numel())
    assert own.written == 4 * 300 and own.flops - plain.flops == 2 * W.numel() * 2 * 8


def test_a_rule_is_the_same_condition_in_cpp():
    assert takes.IN_CPP.count("\n") + 1 == len(takes.RULES)
    for rule, line in zip(takes.RULES, takes.IN_CPP.splitlines(), strict=True):
        assert f"{rule.library}.load()" in line and ("!drops" in line) != rule.drops
        assert ("MOST_RANKS" in line, "FEWEST_ROWS" in line, "EMULATES" in line) == (rule.few, rule.many, rule.emulated)


def edited(function):
    """Another function that does the same."""

    def changed(*args, **kwargs):
        return function(*args, **kwargs)

    return changed


ROW_PARTS = [(name, part) for name, row in registry.ROWS.items() for part in ("lowering", "whole", "split")
             if getattr(row, part) is not None]  # fmt: skip


@pytest.mark.parametrize("name, part", ROW_PARTS)
def test_the_fingerprint_changes_with_every_part_of_a_row(monkeypatch, name, part):
    before, row = registry.fingerprint(), registry.row(name)
    changed = dataclasses.replace(row, **{part: edited(getattr(row, part))})
    monkeypatch.setitem(registry.ROWS, name, changed)
    assert registry.fingerprint() != before


@pytest.mark.parametrize("part", ["run", "takes", "platform", "cost"])
@pytest.mark.parametrize("name", [name for name, row in registry.ROWS.items() if row.kernels])
def test_the_fingerprint_changes_with_every_part_of_a_kernel(monkeypatch, name, part):
    before, row = registry.fingerprint(), registry.row(name)
    *others, last = row.kernels
    changed = dataclasses.replace(last, **{part: edited(getattr(last, part) or dialect.get(name).cost)})
    monkeypatch.setitem(registry.ROWS, name, dataclasses.replace(row, kernels=(*others, changed)))
    assert registry.fingerprint() != before
