"""drop_dropout: an adapter's dropout that does nothing is removed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from adaptc.ir.ops.lora import draw_tensor
from adaptc.ir.sites import lora_nodes
from adaptc.passes.canonicalise.drop_dropout import drop_dropout
from adaptc.passes.contract import Context
from tests.passes.graphs import DTYPES, Graph, check_adapters, ops, run_rewrite, tensors

IDLE = [(0.0, True), (0.0, False), (0.3, False)]


def dropped(values, p, training):
    """An adapter whose input goes through a dropout, as ``insert`` writes it."""
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    dropout = build.call(F.dropout, x, p, training)
    return build, dropout, build.lora(dropout, y, a, b, s)


@pytest.mark.parametrize("p, training", IDLE)
def test_an_idle_dropout_goes(p, training):
    values = tensors()
    build, _, y = dropped(values, p, training)
    gm = build.module(y)
    assert ops(gm) == {"dropout": 1, "lora_linear": 1}
    result = run_rewrite(drop_dropout, gm)
    assert [(r.site, r.removed) for r in result.applied] == [("fc", ("lora_linear_default", "dropout"))]
    assert result.refused == []
    assert ops(gm) == {"lora_linear": 1}
    check_adapters(gm, values)


@given(data=st.data())
def test_value_and_gradients(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 7)) for _ in range(3))
    values = {
        "x": draw_tensor(draw, (*batch, k), dtype).requires_grad_(draw(st.booleans())),
        "y": draw_tensor(draw, (*batch, n), dtype).requires_grad_(draw(st.booleans())),
        "A1": draw_tensor(draw, (r, k), dtype).requires_grad_(),
        "B1": draw_tensor(draw, (n, r), dtype).requires_grad_(),
        "s1": draw_tensor(draw, (1,), torch.float64),
    }
    build, _, y = dropped(values, *draw(st.sampled_from(IDLE)))
    gm = build.module(y)
    assert len(run_rewrite(drop_dropout, gm).applied) == 1
    check_adapters(gm, values)


def assert_left_alone(gm):
    text = gm.code
    result = run_rewrite(drop_dropout, gm)
    assert (result.applied, result.refused, gm.code) == ([], [], text)


def test_a_dropout_that_drops_stays():
    build, _, y = dropped(tensors(), 0.3, True)
    assert_left_alone(build.module(y))


def test_a_dropout_that_others_read_stays():
    build, dropout, y = dropped(tensors(), 0.0, True)
    assert_left_alone(build.module(y, build.call(torch.sin, dropout)))


def test_a_dropout_that_no_adapter_reads_stays():
    values = tensors()
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    assert_left_alone(build.module(build.lora(x, build.call(F.dropout, y, 0.0, True), a, b, s)))


@pytest.mark.parametrize("write", [
    lambda build, x: build.call(F.dropout, x, p=0.0, training=True),
    lambda build, x: build.call(F.dropout, x, 0.0, True, False),
    lambda build, x: build.call(F.dropout, x, 0.0),
    lambda build, x: build.call(F.alpha_dropout, x, 0.0, True),
], ids=["keywords", "four arguments", "defaults", "another function"])  # fmt: skip
def test_a_dropout_of_the_base_model_stays(write):
    values = tensors(batch=(2, 4))
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    assert_left_alone(build.module(build.lora(write(build, x), y, a, b, s)))


def test_stops_at_its_limit():
    values = tensors(ranks=(2, 3))
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    y1 = build.lora(build.call(F.dropout, x, 0.0, True), y, a1, b1, s1, site="first")
    gm = build.module(build.lora(build.call(F.dropout, x, 0.0, True), y1, a2, b2, s2, site="second"))
    result = run_rewrite(drop_dropout, gm, Context(budget=1))
    assert [r.site for r in result.applied] == ["first"]
    assert result.refused == [("second", "limit reached")]
    assert ops(gm) == {"dropout": 1, "lora_linear": 2}
    check_adapters(gm, values)


@pytest.mark.parametrize("p, training", IDLE)
def test_a_write_behind_an_idle_dropout_is_seen_with_and_without_it(p, training):
    values = tensors(grad_x=False)
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    inner = build.call(torch.tanh, x)
    dropout = build.call(F.dropout, inner, p, training)
    write = build.call("mul_", inner, 2)
    gm = build.module(build.lora(dropout, y, a, b, s), write)
    changed = {**values, "x": 2 * torch.tanh(values["x"])}
    check_adapters(gm, changed, list(values.values()))
    assert len(run_rewrite(drop_dropout, gm).applied) == 1
    assert lora_nodes(gm)[0].args[0] is inner
    check_adapters(gm, changed, list(values.values()))
