"""sink_scale: s * ((x A^T) B^T) becomes (s * x A^T) B^T."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.ir.ops.lora import draw_tensor
from adaptc.ir.sites import LORA_LINEAR, lora_nodes
from adaptc.passes.canonicalise.sink_scale import sink_scale
from adaptc.passes.contract import Context
from tests.passes.graphs import DTYPES, Graph, check_adapters, ops, run_rewrite, tensors


def one_adapter(values, scale_at="n"):
    build = Graph()
    nodes = [build.input(name, tensor) for name, tensor in values.items()]
    return build, nodes, build.lora(*nodes, scale_at)


def test_fires_once_per_adapter():
    values = tensors(ranks=(2, 3))
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    y1 = build.lora(x, y, a1, b1, s1, site="first")
    gm = build.module(build.lora(x, y1, a2, b2, s2, site="second"))
    before = ops(gm)
    result = run_rewrite(sink_scale, gm)
    assert [r.site for r in result.applied] == ["first", "second"]
    assert result.refused == []
    assert before == ops(gm) == {"lora_linear": 2}
    assert [n.args[5] for n in lora_nodes(gm)] == ["r", "r"]
    check_adapters(gm, values)


def test_a_second_run_changes_nothing():
    build, _, y = one_adapter(tensors())
    gm = build.module(y)
    run_rewrite(sink_scale, gm)
    text = gm.code
    result = run_rewrite(sink_scale, gm)
    assert (result.applied, result.refused, gm.code) == ([], [], text)


@given(data=st.data())
def test_value_and_gradients(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize < 4 else dtype]))
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 7)) for _ in range(3))
    values = {
        "x": draw_tensor(draw, (*batch, k), dtype).requires_grad_(draw(st.booleans())),
        "y": draw_tensor(draw, (*batch, n), dtype).requires_grad_(draw(st.booleans())),
        "A1": draw_tensor(draw, (r, k), factors).requires_grad_(),
        "B1": draw_tensor(draw, (n, r), factors).requires_grad_(),
        "s1": draw_tensor(draw, (1,), torch.float64),
    }
    build, _, y = one_adapter(values)
    gm = build.module(y)
    assert len(run_rewrite(sink_scale, gm).applied) == 1
    check_adapters(gm, values)


def test_refuses_a_trained_scale():
    values = tensors()
    values["s1"].requires_grad_()
    build, _, y = one_adapter(values)
    gm = build.module(y)
    result = run_rewrite(sink_scale, gm)
    assert result.applied == []
    assert result.refused == [("fc", "scale is trained: its gradient needs the unscaled bottleneck")]
    assert [n.args[5] for n in lora_nodes(gm)] == ["n"]


def test_refuses_a_scale_of_which_nothing_is_known():
    build, (*_, scale), y = one_adapter(tensors())
    gm = build.module(y)
    del scale.meta["example_value"]
    result = run_rewrite(sink_scale, gm)
    assert result.applied == []
    assert result.refused == [("fc", "nothing is known about the scale: it may be trained")]


@pytest.mark.parametrize("reader", ["item", "tuple"])
def test_refuses_when_the_unscaled_bottleneck_is_read(reader):
    values = tensors()
    build = Graph()
    node = build.call(LORA_LINEAR(), *(build.input(*item) for item in values.items()), "n", site="fc")
    y = build.call(operator.getitem, node, 0)
    gm = build.module(y, build.call(operator.getitem, node, 1) if reader == "item" else node)
    result = run_rewrite(sink_scale, gm)
    assert result.applied == []
    assert result.refused == [("fc", "its unscaled bottleneck is read by another node")]


def test_stops_at_its_limit():
    values = tensors(ranks=(2, 3))
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    y1 = build.lora(x, y, a1, b1, s1, site="first")
    gm = build.module(build.lora(x, y1, a2, b2, s2, site="second"))
    result = run_rewrite(sink_scale, gm, Context(budget=1))
    assert [r.site for r in result.applied] == ["first"]
    assert result.refused == [("second", "limit reached")]
    check_adapters(gm, values)


def test_two_reads_of_one_output():
    values = tensors()
    build = Graph()
    node = build.call(LORA_LINEAR(), *(build.input(*item) for item in values.items()), "n", site="fc")
    first, second = (build.call(operator.getitem, node, 0) for _ in range(2))
    gm = build.module(build.call(operator.sub, build.call(operator.add, first, first), second))
    assert len(run_rewrite(sink_scale, gm).applied) == 1
    assert ops(gm) == {"lora_linear": 1, "add": 1, "sub": 1}
    check_adapters(gm, values)
