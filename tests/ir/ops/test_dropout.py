"""Seeded dropout: its bits by integer arithmetic, the statistics of its masks, its derivatives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.codegen.cpp import seeded_dropout as kernel
from adaptc.codegen.cpp.seeded_dropout import seeded_dropout
from adaptc.codegen.ops import registry
from adaptc.ir import dialect
from adaptc.ir.ops.dropout import keep_mask
from adaptc.passes.contract import Context
from adaptc.passes.lower import lower
from tests.codegen.ops.test_lowering import graph_of
from tests.ir.formulas import WORD, kept


def dropout(*args):
    return dialect.get("seeded_dropout").overload(*args)


@given(st.data())
def test_every_bit_is_the_hash_of_seed_row_and_column(data):
    x, seed, p = dialect.get("seeded_dropout").sample(data.draw)
    mask = keep_mask(x, seed, p)
    width = x.shape[-1]
    want = [kept(int(seed), i // width, i % width, p) for i in range(x.numel())]
    assert mask.shape == x.shape and mask.flatten().tolist() == want
    got = dropout(x, seed, p)
    assert (got.shape, got.dtype) == (x.shape, x.dtype) and got.is_contiguous()
    exact = x.double() * mask / (1 - p) if p < 1 else torch.zeros_like(x, dtype=torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-7)


def test_large_indices_have_the_same_formula():
    x = torch.empty(1 << 20, 8)
    mask = keep_mask(x, torch.tensor([2**61 + 12345]), 0.3)
    for row in (0, 65535, 65536, (1 << 20) - 1):
        assert mask[row].tolist() == [kept(2**61 + 12345, row, column, 0.3) for column in range(8)]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_the_rate_is_p(p):
    """Within five standard deviations: in all of a mask, and of the rates of its rows, columns and seeds."""
    M, K = 512, 1024
    masks = torch.stack([keep_mask(torch.empty(M, K), torch.tensor([i]), p) for i in range(8)]).double()
    for dims in ((0, 1, 2), (1, 2), (0, 1), (0, 2)):
        rate = masks.mean(dims)
        count = math.prod(masks.shape[d] for d in dims)
        deviation = math.sqrt(p * (1 - p) / count)
        assert float((rate - (1 - p)).abs().max()) <= 5 * deviation, dims


def correlation(a, b, p):
    """Of two masks, in standard deviations of what independent ones have."""
    centred = (a.double() - (1 - p)) * (b.double() - (1 - p))
    return float(centred.sum()) / (p * (1 - p) * math.sqrt(centred.numel()))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_of_neighbours_are_independent(p):
    """Rows, columns, sites of a call, calls with close seeds, and rows and columns exchanged."""
    x = torch.empty(512, 512)
    masks = [keep_mask(x, torch.tensor([seed]), p) for seed in (7, 8, 7 + WORD, 7 ^ (1 << 31), 2**61 + 7)]
    found = [correlation(masks[i], masks[j], p) for i in range(5) for j in range(i)]
    for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 256):
        found.append(correlation(masks[0][lag:], masks[0][:-lag], p))
        found.append(correlation(masks[0][:, lag:], masks[0][:, :-lag], p))
    above = torch.ones(512, 512).triu(1).bool()
    found.append(correlation(masks[0][above], masks[0].t()[above], p))
    assert max(map(abs, found)) < 4.5


def test_runs_of_kept_elements_are_those_of_independent_draws():
    """Patterns of eight neighbours in a row and of eight in a column, by chi-square (255 degrees of freedom)."""
    mask = keep_mask(torch.empty(1024, 1024), torch.tensor([3]), 0.5).long()
    for view in (mask, mask.t()):
        patterns = (view.reshape(-1, 8) * 2 ** torch.arange(8)).sum(1)
        counts = torch.bincount(patterns, minlength=256).double()
        expected = counts.sum() / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_derivatives_of_two_orders_drop_what_the_forward_drops(p):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([2**61])
    assert torch.autograd.gradcheck(lambda t: dropout(t, seed, p), x)
    assert torch.autograd.gradgradcheck(lambda t: dropout(t, seed, p).sin(), x)
    (g,) = torch.autograd.grad(dropout(x, seed, p).sum(), x)
    assert torch.equal(g != 0, keep_mask(x, seed, p) & (p < 1))


@given(st.data())
def test_lowered_it_has_the_same_bits(data):
    x, seed, p = dialect.get("seeded_dropout").sample(data.draw)
    gm, tensors = graph_of("seeded_dropout", [x, seed, p])
    stays = lower(gm, Context())
    assert stays.applied == [] and stays.refused == [], "on the CPU it has a kernel"
    with pytest.MonkeyPatch.context() as patch:
        row = dataclasses.replace(registry.row("seeded_dropout"), whole=lambda *args: False)
        patch.setitem(registry.ROWS, "seeded_dropout", row)
        assert len(lower(gm, Context()).applied) == 1
    assert torch.equal(gm(*tensors)[0], dropout(x, seed, p))


@given(st.data())
@settings(max_examples=8)
def test_torchs_own_checks_of_a_custom_op(data):
    x, seed, p = dialect.get("seeded_dropout").sample(data.draw)
    torch.library.opcheck(dialect.get("seeded_dropout").overload, (x.requires_grad_(), seed, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_computes_the_body_to_the_bit(dtype, threads, monkeypatch):
    """Large enough for several threads; with values that rounding, overflow and NaN make hard."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    for shape in ((3, 70, 331), (1, 1), (5, 0), (0, 4), (2, 4096)):
        x = (torch.randn(shape) * torch.exp(20 * torch.randn(shape))).to(dtype)
        x.view(-1)[: x.numel() // 9] = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-40])[
            torch.randint(5, (x.numel() // 9,))
        ].to(dtype)
        seed = torch.randint(2**62, (1,))
        got, want = seeded_dropout(x.mT.contiguous().mT, seed, 0.3), dialect.get("seeded_dropout").body(x, seed, 0.3)
        assert (got.shape, got.dtype) == (want.shape, want.dtype) and got.is_contiguous()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_without_a_compiler_the_body_runs(monkeypatch):
    x, seed = torch.randn(4, 5), torch.tensor([5])
    want = dropout(x, seed, 0.5)
    monkeypatch.setattr(kernel, "_library", lambda: None)
    assert registry.kernel_for("seeded_dropout", x.device, x, seed, 0.5) is None
    assert torch.equal(dropout(x, seed, 0.5), want)
