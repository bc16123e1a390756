"""LoRA by rows in the memory of the frozen layer's output."""

from __future__ import annotations

import pytest
import torch

from adaptc.codegen.ops.in_place import LORA_ROWS
from adaptc.ir import dialect
from tests.passes.accumulate.test_accumulate import rewritten

rows = dialect.get("lora_rows").overload
IDS = torch.tensor([0, 5, 1, 0, 1, 1])


def operands(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 5), (5, 4), (2, 4), (3, 4), (5, 2), (5, 3), (1,), (1,)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]  # x, w, v, a1, a2, b1, b2, s1, s2


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

    def run(x, w, v, a1, a2, b1, b2, s1, s2, ids):
        out, kept, *others = function(x, w, ([a1, a2], [b1, b2], [s1, s2], ids, [0, 1]))
        return out.exp(), kept, *others

    applied, targets = rewritten(run, *operands(), IDS)
    assert (applied, targets.count(LORA_ROWS), targets.count(rows)) == (count, count, 1 - count)


def test_an_output_whose_bottleneck_nobody_reads_is_made_in_place_too():
    def run(x, w, v, a1, a2, b1, b2, s1, s2, ids):
        return rows(x, x @ w, [a1, a2], [b1, b2], [s1, s2], ids, [0, 1])[0]

    applied, targets = rewritten(run, *operands(), IDS)
    assert applied == 1 and rows not in targets


def test_what_no_kernel_takes_is_added_op_by_op():
    def run(x, w, v, a1, a2, b1, b2, s1, s2, ids):
        return rows(x, x @ w, [a1, a2], [b1, b2], [s1, s2], ids, [0, 1])

    applied, targets = rewritten(run, *operands(torch.float64), IDS)
    assert applied == 1 and LORA_ROWS in targets
