"""LoRA by rows in the memory of the frozen layer's output, and of the gradient of its input."""

from __future__ import annotations

import operator

import pytest
import torch

from adaptc.codegen.ops.in_place import LORA_ROWS, LORA_ROWS_GRADS
from adaptc.ir import dialect
from tests.passes.accumulate.test_accumulate import rewritten

aten = torch.ops.aten
rows, grads = dialect.get("lora_rows").overload, dialect.get("lora_rows_grads").overload
IDS = torch.tensor([0, 5, 1, 0, 1, 1])


def operands(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 5), (5, 4), (2, 4), (3, 4), (5, 2), (5, 3), (1,), (1,), (6, 5), (6, 3)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]  # x, w, v, a1, a2, b1, b2, s1, s2, g, h


FORWARD = {
    "a product": (1, lambda x, w, r: rows(x, x @ w, *r)),
    "through views": (1, lambda x, w, r: rows(x, (x @ w).view(2, 3, 5).view(6, 5), *r)),
    "what a loop writes": (1, lambda x, w, r: rows(x, x @ w + 1, *r)),
    "an output that is read": (0, lambda x, w, r: (*rows(x, y := x @ w, *r), y.exp())),
    "an output that is read behind": (0, lambda x, w, r: (lambda y: (*rows(x, y, *r), y * 2))(x @ w)),
    "an input of the graph": (0, lambda x, w, r: rows(x, x[:, :1].expand(6, 5), *r)),
    "an input that is the output": (0, lambda x, w, r: (lambda y: rows(y[:, :4], y, *r))(x @ w)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_outputs(name):
    count, function = FORWARD[name]

    def run(x, w, v, a1, a2, b1, b2, s1, s2, g, h, ids):
        out, kept, *others = function(x, w, ([a1, a2], [b1, b2], [s1, s2], ids, [0, 1]))
        return out.exp(), kept, *others

    applied, targets = rewritten(run, *operands(), IDS)
    assert (applied, targets.count(LORA_ROWS), targets.count(rows)) == (count, count, 1 - count)


def test_an_output_whose_bottleneck_nobody_reads_is_made_in_place_too():
    def run(x, w, v, a1, a2, b1, b2, s1, s2, g, h, ids):
        return rows(x, x @ w, [a1, a2], [b1, b2], [s1, s2], ids, [0, 1])[0]

    applied, targets = rewritten(run, *operands(), IDS)
    assert applied == 1 and rows not in targets


BACKWARD = {
    "a product": (1, lambda g, v, made: made[0] + g @ v),
    "the other way round": (1, lambda g, v, made: g @ v + made[0]),
    "through views": (1, lambda g, v, made: made[0].view(2, 3, 4) + (g @ v).view(2, 3, 4)),
    "a product that is read": (0, lambda g, v, made: (lambda base: (made[0] + base) * base)(g @ v)),
    "a gradient that is read": (0, lambda g, v, made: (made[0] + g @ v) * made[0]),
    "a factor's gradient that is read before": (0, lambda g, v, made: made[0] + g @ v * made[1].sum()),
    "two terms of it": (0, lambda g, v, made: made[0] + made[0]),
    "an input of the graph": (0, lambda g, v, made: made[0] + g[:, :4]),
}


@pytest.mark.parametrize("need", [[True] * 4, [False, True, False, True], [False] * 4])
@pytest.mark.parametrize("name", BACKWARD)
def test_gradients(name, need):
    count, function = BACKWARD[name]
    if "factor" in name and not need[0]:
        return

    def run(x, w, v, a1, a2, b1, b2, s1, s2, g, h, ids):
        made = grads(g, x, h, [a1, a2], [b1, b2], [s1, s2], ids, [0, 1], True, need)
        return function(g, v, made).exp(), *made[1:]

    applied, targets = rewritten(run, *operands(), IDS)
    assert (applied, targets.count(LORA_ROWS_GRADS), targets.count(grads)) == (count, count, 1 - count)
    if count:
        assert aten.add.Tensor not in targets and targets.count(operator.getitem) == sum(need)


def test_without_the_gradient_of_the_input_there_is_nothing_to_add():
    def run(x, w, v, a1, a2, b1, b2, s1, s2, g, h, ids):
        made = grads(g, x, h, [a1, a2], [b1, b2], [s1, s2], ids, [0, 1], False, [True, False, False, False])
        return made[0] + (g @ v)[:2]

    assert rewritten(run, *operands(), IDS)[0] == 0


def test_several_gradients_of_one_input_are_added_to_one_memory():
    def run(x, w, v, a1, a2, b1, b2, s1, s2, g, h, ids):
        total = None
        for scale in (1.0, 2.0, 3.0):
            one = g * scale
            made = grads(one, x, h, [a1, a2], [b1, b2], [s1, s2], ids, [0, 1], True, [False] * 4)[0]
            total = made if total is None else total + made
            total = total + one @ v  # as autograd adds them
        return total.relu()

    _, targets = rewritten(run, *operands(), IDS)
    assert targets.count(LORA_ROWS_GRADS) == 3 and aten.add.Tensor not in targets


def test_what_no_kernel_takes_is_added_op_by_op():
    def run(x, w, v, a1, a2, b1, b2, s1, s2, g, h, ids):
        rest = [a1, a2], [b1, b2], [s1, s2], ids, [0, 1]
        made = grads(g, x, h, *rest, True, [True] * 4)
        return *rows(x, x @ w, *rest), made[0] + g @ v, *made[1:]

    applied, targets = rewritten(run, *operands(torch.float64), IDS)
    assert applied == 2 and {LORA_ROWS, LORA_ROWS_GRADS} <= set(targets)
