"""join_adapters: several adapters of one site become one of the summed rank."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.ir.ops.lora import draw_tensor
from adaptc.ir.sites import LORA_LINEAR, lora_nodes
from adaptc.passes.canonicalise.join_adapters import join_adapters
from adaptc.passes.contract import Context
from tests.passes.graphs import DTYPES, Graph, check_adapters, ops, run_rewrite, tensors


class Stack:
    """Adapters of one site on top of each other; ``between`` may put nodes between them and change operands."""

    def __init__(self, values, scales_at="rr", between=lambda stack, y: y, sites=("fc", "fc", "fc")):
        self.build = Graph()
        self.nodes = {name: self.build.input(name, tensor) for name, tensor in values.items()}
        y = self.nodes["y"]
        for i, scale_at in enumerate(scales_at, start=1):
            y = between(self, y) if i > 1 else y
            factors = [self.nodes[f"{name}{i}"] for name in "ABs"]
            y = self.build.lora(self.nodes["x"], y, *factors, scale_at, site=sites[i - 1])
        self.y = y

    def module(self, *more):
        return self.build.module(self.y, *more)


def pair(**options):
    return tensors(ranks=(2, 3), **options)


def test_two_adapters_become_one():
    values = pair()
    gm = Stack(values).module()
    assert ops(gm) == {"lora_linear": 2}
    result = run_rewrite(join_adapters, gm)
    assert ([r.site for r in result.applied], result.refused) == (["fc"], [])
    assert ops(gm) == {"lora_linear": 1, "cat": 3, "expand": 2}
    check_adapters(gm, values)


def test_three_adapters_become_one():
    values = tensors(ranks=(2, 3, 1))
    gm = Stack(values, "rrr").module()
    result = run_rewrite(join_adapters, gm)
    assert (len(result.applied), result.refused) == (2, [])
    assert ops(gm)["lora_linear"] == 1
    check_adapters(gm, values)


@given(data=st.data())
def test_value_and_gradients(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize < 4 else dtype]))
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    values = {
        "x": draw_tensor(draw, (*batch, k), dtype).requires_grad_(draw(st.booleans())),
        "y": draw_tensor(draw, (*batch, n), dtype).requires_grad_(draw(st.booleans())),
    }
    for i in (1, 2):
        r = draw(st.integers(1, 7))
        values[f"A{i}"] = draw_tensor(draw, (r, k), factors).requires_grad_()
        values[f"B{i}"] = draw_tensor(draw, (n, r), factors).requires_grad_()
        values[f"s{i}"] = draw_tensor(draw, (1,), torch.float64)
    gm = Stack(values).module()
    assert len(run_rewrite(join_adapters, gm).applied) == 1
    check_adapters(gm, values)


def test_adapters_of_two_sites_on_one_input_stay():
    values = pair()
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    first, second = build.lora(x, y, a1, b1, s1, "r"), build.lora(x, y, a2, b2, s2, "r")
    gm = build.module(build.call(operator.sub, build.call(operator.add, first, second), y))
    result = run_rewrite(join_adapters, gm)
    assert (result.applied, result.refused) == ([], [])
    check_adapters(gm, values)


def refusal(gm):
    """The reason why the second adapter was not joined to the first; the graph is as it was."""
    text = gm.code
    result = run_rewrite(join_adapters, gm)
    assert (result.applied, gm.code) == ([], text)
    ((site, reason),) = result.refused
    assert site == "fc"
    return reason


@pytest.mark.parametrize("casts", [1, 2])
def test_refuses_a_sum_that_is_rounded(casts):
    def rounded(stack, y):
        for dtype in (torch.bfloat16, torch.float32)[-casts:]:
            y = stack.build.call("to", y, dtype)
        return y

    assert refusal(Stack(pair(), between=rounded).module()) == (
        "the sum between the adapters is rounded to another dtype"
    )


def test_refuses_adapters_that_read_different_values():
    values = pair()
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    masked = [build.call(torch.nn.functional.dropout, x, 0.3, True) for _ in range(2)]
    y = build.lora(masked[0], y, a1, b1, s1, "r")
    gm = build.module(build.lora(masked[1], y, a2, b2, s2, "r"))
    assert refusal(gm) == "the adapters read different values (each has its own dropout mask)"


@pytest.mark.parametrize("scales_at", ["nr", "rn", "nn"])
def test_refuses_a_scale_outside_the_bottleneck(scales_at):
    assert refusal(Stack(pair(), scales_at).module()) == "a scale is not folded into its bottleneck"


def test_refuses_when_the_sum_between_is_read():
    def keep(stack, y):
        stack.kept = y
        return y

    stack = Stack(pair(), between=keep)
    assert refusal(stack.module(stack.kept)) == "the value between the adapters is read by another node"


def test_refuses_when_the_first_bottleneck_is_read():
    def keep(stack, y):
        stack.h = stack.build.call(operator.getitem, y.args[0], 1)
        return y

    stack = Stack(pair(), between=keep)
    assert refusal(stack.module(stack.h)) == "the value between the adapters is read by another node"


def test_refuses_when_the_second_bottleneck_is_read():
    stack = Stack(pair())
    h = stack.build.call(operator.getitem, stack.y.args[0], 1)
    assert refusal(stack.module(h)) == "a bottleneck is read by another node"


@pytest.mark.parametrize("changed", ["AB", "A", "B"])
def test_refuses_factors_of_different_dtypes(changed):
    values = pair()
    for name in changed:
        values[f"{name}2"] = values[f"{name}2"].detach().double().requires_grad_()
    reason = "the adapters' factors have different dtypes (torch.float32, torch.float64)"
    assert refusal(Stack(values).module()) == reason


@pytest.mark.parametrize("frozen", [["A1", "B1"], ["A2", "B2"], ["A2"], ["B1"]])
def test_refuses_a_trained_and_a_frozen_adapter(frozen):
    values = pair()
    for name in frozen:
        values[name].requires_grad_(False)
    assert refusal(Stack(values).module()) == "one adapter is trained and the other is not"


def test_two_frozen_adapters_become_one():
    values = pair(trained=False)
    gm = Stack(values).module()
    assert len(run_rewrite(join_adapters, gm).applied) == 1
    check_adapters(gm, values)


@pytest.mark.parametrize("written", ["x", "A1", "y"])
def test_refuses_across_a_write(written):
    def write(stack, y):
        stack.build.call("mul_", stack.nodes[written], 2)
        return y

    values = pair(trained=False, grad_x=False)
    assert refusal(Stack(values, between=write).module()) == "mul_ may write to memory between the adapters"


def test_a_write_between_changes_what_the_second_adapter_reads():
    """The write that the barrier is for: joined, both adapters would read the new x."""
    def write(stack, y):
        stack.build.call("mul_", stack.nodes["x"], 2)
        return y

    values = pair(trained=False, grad_x=False, dtype=torch.float64)
    gm = Stack(values, between=write).module()
    x, y, a1, b1, s1, a2, b2, s2 = (tensor.clone() for tensor in values.values())
    expected = y + s1 * (x @ a1.T @ b1.T) + s2 * ((2 * x) @ a2.T @ b2.T)
    run_rewrite(join_adapters, gm)
    torch.testing.assert_close(gm(*(tensor.clone() for tensor in values.values()))[0], expected)


def test_refuses_across_a_change_of_mode():
    def change(stack, y):
        stack.build.call(torch.set_grad_enabled, True)
        return y

    assert refusal(Stack(pair(), between=change).module()) == (
        "set_grad_enabled switches a mode of torch between the adapters"
    )


def test_stops_at_its_limit():
    values = tensors(ranks=(2, 3, 1))
    gm = Stack(values, "rrr", sites=("fc", "second", "third")).module()
    result = run_rewrite(join_adapters, gm, Context(budget=1))
    assert [r.site for r in result.applied] == ["second"]
    assert result.refused == [("third", "limit reached")]
    assert len(lora_nodes(gm)) == 2
    check_adapters(gm, values)


def test_two_reads_of_the_result():
    values = pair()
    stack = Stack(values)
    again = stack.build.call(operator.getitem, stack.y.args[0], 0)
    total = stack.build.call(operator.add, stack.y, stack.y)
    gm = stack.build.module(stack.build.call(operator.sub, total, again))
    assert len(run_rewrite(join_adapters, gm).applied) == 1
    assert ops(gm)["lora_linear"] == 1
    assert all(n.target is LORA_LINEAR() for n in lora_nodes(gm))
    check_adapters(gm, values)
