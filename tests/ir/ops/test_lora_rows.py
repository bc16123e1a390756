"""LoRA by rows: what its kernel computes is the formula of each row, and reads nothing of the rows of others."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.codegen.ops import lora_rows as kernel
from adaptc.ir import dialect

rows, grads = dialect.get("lora_rows"), dialect.get("lora_rows_grads")


@given(st.data())
def test_each_row_is_its_adapters(data):
    x, y, A, B, scale, ids, numbers = rows.sample(data.draw)
    out, h = rows.overload(x, y, A, B, scale, ids, numbers)
    assert (out.shape, out.dtype, out.is_contiguous()) == (y.shape, y.dtype, True)
    places = {number: i for i, number in enumerate(numbers)}
    tolerance = 40 * torch.finfo(x.dtype).eps
    for m, number in enumerate(ids.tolist()):
        if number not in places:
            assert torch.equal(out[m], y[m]) and not h[m].any()
            continue
        a, b, s = (t[places[number]].double() for t in (A, B, scale))
        inner = s * (x[m].double() @ a.T)
        torch.testing.assert_close(h[m, : len(a)].double(), inner, rtol=tolerance, atol=20 * tolerance)
        assert not h[m, len(a) :].any()
        want = y[m].double() + inner @ b.T
        torch.testing.assert_close(out[m].double(), want, rtol=tolerance, atol=60 * tolerance)


@given(st.data())
def test_the_gradients_are_those_of_the_body(data):
    arguments = grads.sample(data.draw)
    got, want = grads.overload(*arguments), grads.body(*arguments)
    assert len(got) == len(want)
    tolerance = 40 * torch.finfo(arguments[0].dtype).eps
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype, one.is_contiguous()) == (other.shape, other.dtype, True)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=200 * tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("run", [rows.body, rows.overload])
def test_what_is_not_finite_stays_in_its_row(run, bad):
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 1, 0, 1])
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    A = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    B = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x[[1, 2]] = bad
    out = run(x, y, A, B, [torch.ones(1, dtype=torch.float64)] * 2, ids, [0, 1])[0]
    assert out[[0, 1, 3, 4]].isfinite().all() and not out[2].isfinite().any()
    out[[0, 3]].sum().backward()
    assert all(t.grad.isfinite().all() for t in (A[0], B[0]))


SPREAD = [[0] * 40, [0] * 20 + [2] * 20, [0, 1] * 20, [1, 2, 0, 2] * 10, [*list(range(3)) * 13, 2]]


@pytest.mark.parametrize("ids", SPREAD)
def test_stretches_cover_the_rows_of_adapters_once_each(ids):
    stretches, order = kernel._plan(torch.tensor(ids), [1, 0])
    taken = order.tolist() if order is not None else list(range(len(ids)))
    assert sorted(taken) == list(range(len(ids)))
    covered = [(taken[i], [1, 0][place]) for place, start, end in stretches for i in range(start, end)]
    assert sorted(covered) == [(i, number) for i, number in enumerate(ids) if number in (0, 1)]
    if order is not None:
        assert len(stretches) == len({place for place, _, _ in stretches}) and len(stretches) <= 2
    for (_, _, end), (_, start, _) in itertools.pairwise(stretches):
        assert end <= start
