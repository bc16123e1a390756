"""sink_casts: casts of factors go into the op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.ir.ops.lora import draw_tensor
from adaptc.ir.sites import lora_nodes
from adaptc.passes.canonicalise.sink_casts import sink_casts
from adaptc.passes.contract import Context
from tests.passes.graphs import Graph, check_adapters, ops, run, run_rewrite, tensors

HALF = torch.bfloat16


def cast_factors(values, cast=("A", "B"), to=HALF, scale_at="n"):
    """An adapter with its factors cast first, as ``insert`` writes it."""
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    ca = build.call("to", a, to) if "A" in cast else a
    cb = build.call("to", b, to) if "B" in cast else b
    return build, (a, b), (ca, cb), lambda: build.lora(x, y, ca, cb, s, scale_at)


def mixed(**options):
    return tensors(dtype=HALF, factors=torch.float32, **options)


@pytest.mark.parametrize("cast", [("A", "B"), ("A",), ("B",)])
def test_casts_become_part_of_the_adapter(cast):
    # A factor that is not cast here has the compute dtype already, or is cast by the op.
    values = mixed()
    build, factors, _, adapter = cast_factors(values, cast)
    gm = build.module(adapter())
    assert ops(gm) == {"to": len(cast), "lora_linear": 1}
    result = run_rewrite(sink_casts, gm)
    assert [r.site for r in result.applied] == ["fc"]
    assert result.refused == []
    assert ops(gm) == {"lora_linear": 1}
    assert lora_nodes(gm)[0].args[2:4] == factors
    check_adapters(gm, values)


@given(data=st.data())
def test_value_and_gradients(data):
    draw = data.draw
    dtype, factors = draw(st.sampled_from([
        (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float64),
        (torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
    ]))  # fmt: skip
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 7)) for _ in range(3))
    values = {
        "x": draw_tensor(draw, (*batch, k), dtype).requires_grad_(draw(st.booleans())),
        "y": draw_tensor(draw, (*batch, n), dtype).requires_grad_(draw(st.booleans())),
        "A1": draw_tensor(draw, (r, k), factors).requires_grad_(),
        "B1": draw_tensor(draw, (n, r), factors).requires_grad_(),
        "s1": draw_tensor(draw, (1,), torch.float64),
    }
    build, _, _, adapter = cast_factors(values, to=dtype, scale_at=draw(st.sampled_from("nr")))
    gm = build.module(adapter())
    inputs, g = list(values.values()), torch.ones_like(values["y"])
    before, _ = run(gm, inputs, g)
    assert len(run_rewrite(sink_casts, gm).applied) == 1
    assert torch.equal(run(gm, inputs, g)[0], before), "the output is the same to the last bit"
    if factors.itemsize >= dtype.itemsize:  # gradients are rounded to the factors' dtype, which the bound is not for
        check_adapters(gm, values)


def test_no_copy_of_a_factor_is_kept_for_the_backward():
    values = mixed()
    build, _, _, adapter = cast_factors(values)
    gm = build.module(adapter())
    shapes = {values["A1"].shape, values["B1"].shape}

    def saved():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            gm(*values.values())
        return {t.dtype for t in kept if t.shape in shapes}

    assert saved() == {HALF}
    run_rewrite(sink_casts, gm)
    assert saved() == {torch.float32}


def test_a_cast_that_others_read_stays_for_them():
    values = mixed()
    build, _, (cast_a, _), adapter = cast_factors(values)
    gm = build.module(adapter(), build.call("sum", cast_a))
    assert len(run_rewrite(sink_casts, gm).applied) == 1
    assert ops(gm) == {"to": 1, "lora_linear": 1, "sum": 1}
    check_adapters(gm, values)


def test_the_outer_of_two_casts_goes():
    values = tensors()
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    rounded = build.call("to", a, HALF)
    gm = build.module(build.lora(x, y, build.call("to", rounded, torch.float32), b, s))
    assert len(run_rewrite(sink_casts, gm).applied) == 1
    assert lora_nodes(gm)[0].args[2] is rounded
    assert ops(gm) == {"to": 1, "lora_linear": 1}


def assert_left_alone(gm, refused=()):
    text = gm.code
    result = run_rewrite(sink_casts, gm)
    assert (result.applied, result.refused, gm.code) == ([], list(refused), text)


def test_a_cast_to_another_dtype_than_the_computation_stays():
    build, _, _, adapter = cast_factors(mixed(), to=torch.float16)
    assert_left_alone(build.module(adapter()))


def test_a_cast_may_name_its_dtype():
    values = mixed()
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    gm = build.module(build.lora(x, y, build.call("to", a, dtype=HALF), b, s))
    assert len(run_rewrite(sink_casts, gm).applied) == 1 and ops(gm) == {"lora_linear": 1}
    check_adapters(gm, values)


@pytest.mark.parametrize("write", [
    lambda build, a: build.call("to", a, HALF, True),
    lambda build, a: build.call("bfloat16", a),
], ids=["more arguments", "another method"])  # fmt: skip
def test_other_ways_of_casting_stay(write):
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in mixed().items())
    assert_left_alone(build.module(build.lora(x, y, write(build, a), b, s)))


@pytest.mark.parametrize("cast", [("A", "B"), ("A",), ("B",)])
def test_refuses_across_a_write(cast):
    build, (a, _), _, adapter = cast_factors(mixed(trained=False), cast)
    build.call("zero_", a)
    gm = build.module(adapter())
    reason = "zero_ may write to memory between a factor's cast and the adapter"
    assert_left_alone(gm, [("fc", reason)])


def test_refuses_across_a_change_of_mode():
    build, _, _, adapter = cast_factors(mixed())
    build.call(torch.set_grad_enabled, True)
    gm = build.module(adapter())
    ((site, reason),) = run_rewrite(sink_casts, gm).refused
    assert site == "fc"
    assert reason.endswith("switches a mode of torch between a factor's cast and the adapter")


def test_a_write_before_the_casts_does_not_matter():
    values = mixed(trained=False, grad_x=False)
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    build.call("zero_", x)
    gm = build.module(build.lora(x, y, build.call("to", a, HALF), b, s))
    assert len(run_rewrite(sink_casts, gm).applied) == 1


def test_stops_at_its_limit():
    values = mixed(ranks=(2, 3))
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    y1 = build.lora(x, y, *(build.call("to", f, HALF) for f in (a1, b1)), s1, site="first")
    gm = build.module(build.lora(x, y1, *(build.call("to", f, HALF) for f in (a2, b2)), s2, site="second"))
    result = run_rewrite(sink_casts, gm, Context(budget=1))
    assert [r.site for r in result.applied] == ["first"]
    assert result.refused == [("second", "limit reached")]
    assert ops(gm) == {"to": 2, "lora_linear": 2}
    check_adapters(gm, values)
