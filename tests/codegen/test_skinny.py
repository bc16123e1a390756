"""The C++ kernels for products with a small side, at sizes with whole and cut tiles, against fp64 and the op's body."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.codegen.cpp import skinny
from adaptc.codegen.ops import registry
from adaptc.errors import AdaptcWarning
from adaptc.ir import dialect
from adaptc.ir.ops import lora_fused, lora_split
from adaptc.ir.ops.dropout import keep_mask

SIZES = st.sampled_from([1, 2, 5, 6, 7, 12, 13, 31, 64, 65, 130])
WIDTHS = st.sampled_from([1, 3, 8, 15, 16, 17, 63, 64, 100, 129, 511, 512, 513, 1024, 1030])
RANKS = st.lists(st.sampled_from([1, 3, 4, 8, 9, 16, 17, 33]), min_size=1, max_size=3)


@st.composite
def cases(draw):
    """dtype, x (M, K), h of each group (M, r), A of each (r, K), seeds and p."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    M, K, ranks = draw(SIZES), draw(WIDTHS), draw(RANKS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = tensor(M, 2 * K)[:, :K] if draw(st.booleans()) else tensor(M, K)
    seeds, p = [], []
    if draw(st.booleans()):
        seeds = [torch.tensor([draw(st.integers(0, 2**62 - 1))]) for _ in ranks]
        p = [draw(st.sampled_from([0.0, 0.05, 0.5, 0.9])) for _ in ranks]
    return x, [tensor(M, r) for r in ranks], [tensor(r, K) for r in ranks], seeds, p


def masks(x, count, seeds, p):
    """Which elements are kept, over 1 - p, in fp64; the bits of the hash are tested by integers elsewhere."""
    if not seeds:
        return [torch.ones(x.shape, dtype=torch.float64)] * count
    return [keep_mask(x, seed, rate).double() / (1 - rate) for seed, rate in zip(seeds, p, strict=True)]


def check(got, body, want, size):
    """As near to fp64 as the body in the same dtype: all of it, and no element by more than what another order of the
    sum may cost, a few units of what is summed."""
    for one, other, exact, terms in zip(got, body, want, size, strict=True):
        assert one.shape == exact.shape and one.is_contiguous()
        eps = torch.finfo(other.dtype).eps
        error, error_of_body = (one.double() - exact).abs(), (other.double() - exact).abs()
        assert bool((error <= 1.1 * error_of_body + 4 * eps * terms).all()), float((error / terms).max() / eps)
        assert float(error.square().mean().sqrt()) <= float(
            1.1 * error_of_body.square().mean().sqrt() + eps * terms.square().mean().sqrt()
        )


@given(case=cases())
@settings(max_examples=150)
def test_shrink(case):
    x, _, A, seeds, p = case
    scale = [torch.tensor([0.5 + i], dtype=torch.float64) for i in range(len(A))]
    got = skinny.shrink(x, A, scale, seeds, p)
    pairs = list(zip(masks(x, len(A), seeds, p), A, scale, strict=True))
    want = [s * (x.double() * m) @ a.double().t() for m, a, s in pairs]
    size = [s * (x.double() * m).abs() @ a.double().abs().t() for m, a, s in pairs]
    check(got, lora_split.shrink_body(x, A, scale, seeds, p), want, size)
    assert all(h.dtype == x.dtype for h in got)


@given(case=cases())
@settings(max_examples=150)
def test_gradient(case):
    x, h, _, seeds, p = case
    pairs = list(zip(masks(x, len(h), seeds, p), h, strict=True))
    want = [one.double().t() @ (x.double() * m) for m, one in pairs]
    size = [one.double().abs().t() @ (x.double() * m).abs() for m, one in pairs]
    body = lora_split.factor_grads_body(h, x, torch.float32, seeds, p)
    got = skinny.gradient(h, x, torch.float32, seeds, p)
    check(got, body, want, size)


@given(case=cases())
@settings(max_examples=150)
def test_update(case):
    x, q, A, seeds, p = case
    total = x.contiguous()
    pairs = list(zip(masks(x, len(A), seeds, p), q, A, strict=True))
    want = total.double() + sum(m * (one.double() @ a.double()) for m, one, a in pairs)
    size = total.double().abs() + sum(m * (one.double().abs() @ a.double().abs()) for m, one, a in pairs)
    body = lora_split.input_grads_body(total, q, A, seeds, p)
    got = total.clone()
    skinny.update(got, q, A, seeds, p)
    check([got], [body], [want], [size])


@given(case=cases(), wide=st.booleans(), turned=st.booleans())
@settings(max_examples=150)
def test_both(case, wide, turned):
    g, (h, *_), (A, *_), _, _ = case
    dtype = torch.float32 if wide else g.dtype
    B = A.t().to(dtype) if turned else A.t().to(dtype).contiguous()
    scale = torch.linspace(0.5, 2, B.shape[1], dtype=torch.float64)
    got = skinny.both(g, h, B, scale, dtype)
    want = scale * (g.double() @ B.double()), g.double().t() @ h.double()
    size = scale * (g.double().abs() @ B.double().abs()), g.double().abs().t() @ h.double().abs()
    check(got, lora_fused.bottleneck_grads_body(g, h, B, scale, dtype), want, size)
    assert [t.dtype for t in got] == [g.dtype, dtype]


def test_long_sums_round_no_more_than_the_libraries():
    """Of many rows and of wide ones, all of one sign."""
    generator = torch.Generator().manual_seed(0)
    x, h, A = (torch.rand(shape, generator=generator) for shape in ((20011, 40), (20011, 5), (5, 20011)))
    one = torch.ones(1, dtype=torch.float64)

    def error(got, want):
        return float((got.double() - want).norm() / want.norm())

    want = h.double().t() @ x.double()
    body = error(h.t() @ x, want)
    assert error(skinny.gradient([h], x, torch.float32)[0], want) <= 3 * body
    assert error(skinny.both(x, h, A[:, :40].t(), one, torch.float32)[1].t(), want) <= 3 * body
    wide, B = x.t().contiguous(), A.t()
    want = wide.double() @ B.double()
    body = error(wide @ B, want)
    assert error(skinny.shrink(wide, [A], [one])[0], want) <= 3 * body
    assert error(skinny.both(wide, torch.rand(40, 5), B, one, torch.float32)[0], want) <= 3 * body


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="without these instructions anyway")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors(flag, tmp_path):
    """The tests above on kernels with vectors of 8 and of 4 numbers, whose tiles are other ones."""
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    usual = shlex.join(shlex.split(os.environ.get("CXX", "g++")))
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {usual} "$@" {flag}\n')
    compiler.chmod(0o755)
    names = "test_shrink or test_gradient or test_update or test_both or test_long_sums or test_row_norms"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__, "-k", names],
        env={**os.environ, "CXX": str(compiler)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert calls.read_text()


@given(case=cases(), scale=st.sampled_from([0.0, 0.5, 3.0]), wide=st.booleans())
@settings(max_examples=150)
def test_row_norms(case, scale, wide):
    W, left, (A, *_), _, _ = case
    rank = A.shape[0]
    A = A.to(torch.float32 if wide else W.dtype)
    B = torch.randn(W.shape[0], rank, generator=torch.Generator().manual_seed(rank)).to(A.dtype)
    if W.stride(1) != 1:
        W = W.contiguous()
    got = skinny.row_norms(W, A, B, torch.tensor([scale]))
    corrected = W.double() + scale * B.double() @ A.double()
    want = corrected.square().sum(1)
    # The square of a row in which the correction cancels the weight has the rounding of either.
    size = (W.double().abs() + scale * B.double().abs() @ A.double().abs()).square().sum(1)
    assert (got.dtype, got.shape) == (torch.float32, want.shape)
    assert bool(((got.double().square() - want).abs() <= 4 * torch.finfo(torch.float32).eps * size).all())


def test_a_row_norm_tells_a_weight_that_is_not_finite():
    W = torch.ones(3, 9)
    W[1, 4], W[2, 8] = float("nan"), float("inf")
    norms = skinny.row_norms(W, torch.zeros(2, 9), torch.zeros(3, 2), torch.ones(1))
    assert float(norms[0]) == 3.0 and bool(norms[1].isnan()) and bool(norms[2].isinf() or norms[2].isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_defaults_of_the_process_do_not_matter(dtype):
    x, h, A, B = torch.randn(7, 20), torch.randn(7, 3), torch.randn(3, 20), torch.randn(7, 3)
    A2, scale, total = torch.randn(2, 20), torch.tensor([2.0]), torch.zeros(7, 20)

    def run():
        sums = total.clone()
        skinny.update(sums, [h], [A])
        return [*skinny.shrink(x, [A, A2], [scale, scale]), *skinny.gradient([h], x, torch.float32), sums,
                *skinny.both(x, h, A.t(), scale, torch.float32), skinny.row_norms(x, A, B, scale)]  # fmt: skip

    want = run()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_compiler_that_fails_is_told_of_and_does_without(monkeypatch):
    from torch._inductor.codecache import CppCodeCache

    def fail(source):
        raise RuntimeError("omp.h: no such file\nand more")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    skinny.library.cache_clear()
    try:
        with pytest.warns(AdaptcWarning, match=r"slower ones run: they do not compile \(omp\.h: no such file\)"):
            assert not skinny.is_there(torch.device("cpu"))
        assert not skinny.is_there(torch.device("cpu"))  # asked once
    finally:
        skinny.library.cache_clear()


def test_what_does_not_fit_is_named():
    x, q, one, seed = torch.randn(5, 8), torch.randn(5, 2), torch.ones(1), torch.tensor([3])
    for call in (
        lambda: skinny.shrink(x, [torch.randn(2, 4)], [one]),
        lambda: skinny.shrink(x, [torch.randn(4, 8)], [torch.ones(2)]),
        lambda: skinny.shrink(x, [torch.randn(2, 8)] * 2, [one] * 2, [seed], [0.5]),
        lambda: skinny.shrink(x, [torch.randn(2, 8)], [one], [seed.int()], [0.5]),
        lambda: skinny.shrink(x.double(), [torch.randn(2, 8)], [one]),
        lambda: skinny.gradient([q[:1]], x, torch.float32),
        lambda: skinny.both(x, q, torch.randn(7, 2), one, torch.float32),
        lambda: skinny.both(x, q, torch.randn(8, 3), one, torch.float32),
        lambda: skinny.update(x, [q], [torch.randn(3, 8)]),
        lambda: skinny.update(x.t(), [torch.randn(8, 2)], [torch.randn(2, 5)]),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


def test_what_the_kernels_do_not_take_is_left_to_torch():
    x = torch.randn(3, 4)

    def takes(x):
        args = x, [torch.randn(3, 4)], [torch.ones(1)], [torch.tensor([9])], [0.4]
        return registry.kernel_for("lora_shrink", x.device, *args) is not None

    assert takes(x) and takes(x.bfloat16())
    assert not takes(x.double()) and not takes(x.half()) and not takes(x[:0])
    assert not takes(x.to("meta"))

    class Wrapped(torch.Tensor):
        pass

    assert not takes(x.as_subclass(Wrapped))


@pytest.mark.parametrize("name", ["lora_shrink", "lora_factor_grads", "lora_input_grads"])
def test_without_a_compiler_the_bodies_run(name, monkeypatch):
    x, q, A, seed = torch.randn(5, 8), [torch.randn(5, 3)], [torch.randn(3, 8)], [torch.tensor([9])]
    args = {
        "lora_shrink": (x, A, [torch.ones(1)], seed, [0.4]),
        "lora_factor_grads": (q, x, torch.float32, seed, [0.4]),
        "lora_input_grads": (x, q, A, seed, [0.4]),
    }[name]
    with_kernel = dialect.get(name).overload(*args)
    monkeypatch.setattr(skinny, "library", lambda: None)
    without = dialect.get(name).overload(*args)
    torch.testing.assert_close(with_kernel, without)
    assert registry.kernel_for(name, x.device, *args) is None


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_rows_and_find_nothing_of_earlier_calls(dtype, drops, threads):
    """As many rows as there is work for each thread, in memory that calls before left NaN in."""
    torch.manual_seed(0)
    (M, K), ranks = (1003, 517), [16, 33]
    x, h = torch.randn(M, K).to(dtype), [torch.randn(M, r).to(dtype) for r in ranks]
    A, scale = [torch.randn(r, K).to(dtype) for r in ranks], [torch.full((1,), 0.75, dtype=torch.float64)] * 2
    seeds, p = ([torch.tensor([3]), torch.tensor([7])], [0.1, 0.5]) if drops else ([], [])
    wide, nan = torch.full((M, 640), torch.nan).to(dtype), [torch.full((M, 40), torch.nan).to(dtype)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        skinny.update(wide.clone(), nan, [torch.full((40, 640), torch.nan).to(dtype)], [], [])
        skinny.gradient(nan, wide, dtype, [], [])
        skinny.shrink(wide, [torch.full((40, 640), torch.nan).to(dtype)], scale[:1], [], [])
        total = x.clone()
        skinny.update(total, h, A, seeds, p)
        got = [*skinny.shrink(x, A, scale, seeds, p), *skinny.gradient(h, x, torch.float32, seeds, p), total]
        got += [] if drops else skinny.both(x, h[0], A[0].t(), scale[0], torch.float32)
    finally:
        torch.set_num_threads(before)
    kept, wide_x = masks(x, len(ranks), seeds, p), x.double()
    want = [0.75 * (wide_x * mask) @ a.double().t() for mask, a in zip(kept, A, strict=True)]
    want += [one.double().t() @ (wide_x * mask) for mask, one in zip(kept, h, strict=True)]
    want += [wide_x + sum(mask * (q.double() @ a.double()) for mask, q, a in zip(kept, h, A, strict=True))]
    want += [] if drops else [0.75 * wide_x @ A[0].double().t(), wide_x.t() @ h[0].double()]
    for one, exact in zip(got, want, strict=True):
        bound = 1e-5 if one.dtype == torch.float32 else 6e-3
        assert float((one.double() - exact).norm() / exact.norm()) < bound
