"""Seeded dropout: its bits by integer arithmetic, the statistics of its masks, its derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.ir import dialect
from adaptc.ir.dropout import keep_mask
from adaptc.passes.contract import Context
from adaptc.passes.lower import lower
from tests.codegen.test_lowering import graph_of

WORD = 2**32


def dropout(*args):
    return dialect.get("seeded_dropout").overload(*args)


def lowbias(h):
    """The mixer, in Python's integers."""
    h ^= h >> 16
    h = h * 0x7FEB352D % WORD
    h ^= h >> 15
    h = h * 0x846CA68B % WORD
    return h ^ (h >> 16)


def kept(seed, row, column, p):
    one = lowbias((row * 0x9E3779B1 + seed) % WORD)
    two = lowbias(one ^ (seed // WORD))
    h = column ^ one
    h = ((h ^ (h >> 16)) * 0x7FEB352D % WORD) ^ two
    h = (h ^ (h >> 15)) * 0x846CA68B % WORD
    h ^= h >> 16
    signed = h - WORD if h >= WORD // 2 else h
    return signed + WORD // 2 >= min(math.floor(p * WORD), WORD - 1)


@given(st.data())
def test_every_bit_is_the_hash_of_seed_row_and_column(data):
    x, seeds, index, p = dialect.get("seeded_dropout").sample(data.draw)
    mask = keep_mask(x, seeds, index, p)
    width, seed = x.shape[-1], int(seeds[index])
    want = [kept(seed, i // width, i % width, p) for i in range(x.numel())]
    assert mask.shape == x.shape and mask.flatten().tolist() == want
    got = dropout(x, seeds, index, p)
    assert (got.shape, got.dtype) == (x.shape, x.dtype) and got.is_contiguous()
    exact = x.double() * mask / (1 - p) if p < 1 else torch.zeros_like(x, dtype=torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-7)


def test_large_indices_have_the_same_formula():
    x = torch.empty(1 << 20, 8)
    mask = keep_mask(x, torch.tensor([2**61 + 12345]), 0, 0.3)
    for row in (0, 65535, 65536, (1 << 20) - 1):
        assert mask[row].tolist() == [kept(2**61 + 12345, row, column, 0.3) for column in range(8)]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_the_rate_is_p(p):
    """Within five standard deviations: in all of a mask, and of the rates of its rows, columns and seeds."""
    M, K = 512, 1024
    masks = torch.stack([keep_mask(torch.empty(M, K), torch.arange(8), i, p) for i in range(8)]).double()
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
    seeds = torch.tensor([7, 8, 7 + WORD, 7 ^ (1 << 31), 2**61 + 7])
    masks = [keep_mask(x, seeds, i, p) for i in range(len(seeds))]
    found = [correlation(masks[i], masks[j], p) for i in range(5) for j in range(i)]
    for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 256):
        found.append(correlation(masks[0][lag:], masks[0][:-lag], p))
        found.append(correlation(masks[0][:, lag:], masks[0][:, :-lag], p))
    above = torch.ones(512, 512).triu(1).bool()
    found.append(correlation(masks[0][above], masks[0].t()[above], p))
    assert max(map(abs, found)) < 4.5


def test_runs_of_kept_elements_are_those_of_independent_draws():
    """Patterns of eight neighbours in a row and of eight in a column, by chi-square (255 degrees of freedom)."""
    mask = keep_mask(torch.empty(1024, 1024), torch.tensor([3]), 0, 0.5).long()
    for view in (mask, mask.t()):
        patterns = (view.reshape(-1, 8) * 2 ** torch.arange(8)).sum(1)
        counts = torch.bincount(patterns, minlength=256).double()
        expected = counts.sum() / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_derivatives_of_two_orders_drop_what_the_forward_drops(p):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seeds = torch.tensor([11, 2**61])
    assert torch.autograd.gradcheck(lambda t: dropout(t, seeds, 1, p), x)
    assert torch.autograd.gradgradcheck(lambda t: dropout(t, seeds, 1, p).sin(), x)
    (g,) = torch.autograd.grad(dropout(x, seeds, 1, p).sum(), x)
    assert torch.equal(g != 0, keep_mask(x, seeds, 1, p) & (p < 1))


@given(st.data())
def test_lowered_it_has_the_same_bits(data):
    x, seeds, index, p = dialect.get("seeded_dropout").sample(data.draw)
    gm, tensors = graph_of("seeded_dropout", [x, seeds, index, p])
    assert len(lower(gm, Context()).applied) == 1
    assert torch.equal(gm(*tensors)[0], dropout(x, seeds, index, p))


@given(st.data())
@settings(max_examples=8)
def test_torchs_own_checks_of_a_custom_op(data):
    x, seeds, index, p = dialect.get("seeded_dropout").sample(data.draw)
    torch.library.opcheck(dialect.get("seeded_dropout").overload, (x.requires_grad_(), seeds, index, p))


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_makes_the_same_bits(dtype):
    """Whole vectors and the rest of a row, which are other loops."""
    op = dialect.get("seeded_dropout")
    seeds = torch.tensor([2**61 + 5, 77])
    compiled = torch.compile(lambda x: op.body(x, seeds, 1, 0.3), fullgraph=True)
    for shape in ((33, 64), (5, 19)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(compiled(x), op.body(x, seeds, 1, 0.3))
