"""The C++ kernels for bf16 with a small side, at sizes with whole and cut tiles, against fp64 and the op's body."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.codegen.cpp import pairs
from adaptc.codegen.cpp import takes as table
from adaptc.codegen.cpp.takes import MOST_RANKS
from adaptc.codegen.ops import registry
from adaptc.ir import dialect
from adaptc.ir.ops import dora, dora_expand, dora_grads, lora_fused, lora_split
from tests.codegen.test_skinny import check

needs_pairs = pytest.mark.skipif(pairs.library() is None, reason="no CPU with AVX512_BF16, or no compiler for it")
ROWS = st.sampled_from([1, 2, 3, 11, 12, 13, 24, 31, 95, 96, 97, 130, 200])
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 100, 129, 257])
RANKS = st.lists(st.sampled_from([1, 2, 3, 8, 9, 15, 16, 17, 32, 33, 50]), min_size=1, max_size=3)
BF16 = torch.bfloat16


@st.composite
def cases(draw):
    """x (M, K) or (b, M / b, K), h of each group (..., r), A of each (r, K); factors of either dtype, any strides."""
    M, K, ranks = draw(ROWS), draw(WIDTHS), draw(RANKS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def factor(n, m, dtype):
        base = torch.randn(n, m, generator=generator) if draw(st.booleans()) else (
            torch.randn(m, 2 * n, generator=generator)[:, :n].t() if draw(st.booleans())
            else torch.randn(n, m + 3, generator=generator)[:, 1 : m + 1]
        )  # fmt: skip
        return base.to(dtype)  # keeps the strides, where it is no copy of a part

    wide = torch.randn(M, 2 * K, generator=generator).to(BF16)
    x = wide[:, :K] if draw(st.booleans()) else wide[:, :K].contiguous()
    dtype = draw(st.sampled_from([torch.float32, BF16, torch.float64]))
    h = [factor(M, r, BF16) for r in ranks]
    if M % 2 == 0 and draw(st.booleans()):
        x, h = x.reshape(2, M // 2, K), [one.reshape(2, M // 2, -1) for one in h]
    return x, h, [factor(r, K, dtype) for r in ranks]


def rows(t):
    return t.reshape(-1, t.shape[-1]).double()


def in_bf16(factors):
    """What a cast makes of the factors: the body's products are of these."""
    return [a.to(BF16).double() for a in factors]


def product(left, right):
    """left right, and the same of what is summed."""
    return left @ right, left.abs() @ right.abs()


@needs_pairs
@given(case=cases(), each=st.booleans())
@settings(max_examples=150)
def test_shrink(case, each):
    x, _, A = case
    scale = [torch.arange(1.0, 1 + (a.shape[0] if each else 1), dtype=torch.float64) / 2 for a in A]
    got = pairs.shrink(x, A, scale)
    want, size = zip(*(product(rows(x), a.t() * s) for a, s in zip(in_bf16(A), scale, strict=True)), strict=True)
    body = lora_split.shrink_body(x, A, scale, [], [])
    assert all(h.shape == b.shape and h.dtype == BF16 for h, b in zip(got, body, strict=True))
    check(map(by_rows, got), map(by_rows, body), want, size)


def by_rows(t):
    return t.reshape(-1, t.shape[-1])


@needs_pairs
@given(case=cases(), dtype=st.sampled_from([torch.float32, BF16, torch.float64]))
@settings(max_examples=150)
def test_gradient(case, dtype):
    x, h, _ = case
    got = pairs.gradient(h, x, dtype)
    want, size = zip(*(product(rows(one).t(), rows(x)) for one in h), strict=True)
    assert all(d.dtype == dtype for d in got)
    # The body rounds to bf16 whatever comes out: 1.1 times its error is far above ours in fp32.
    check(got, lora_split.factor_grads_body(h, x, torch.float32 if dtype != BF16 else BF16, [], []), want, size)
    if dtype != BF16:
        limit = [(rows(x).shape[0] + 2) * torch.finfo(torch.float32).eps * s for s in size]
        assert all(bool(((d.double() - w).abs() <= m).all()) for d, w, m in zip(got, want, limit, strict=True))


@needs_pairs
@given(case=cases(), dtype=st.sampled_from([torch.float32, BF16]), each=st.booleans())
@settings(max_examples=150)
def test_both(case, dtype, each):
    g, (h, *_), (A, *_) = case
    B = A.t()
    scale = torch.full((B.shape[1] if each else 1,), 1.5, dtype=torch.float64)
    got = pairs.both(g, h, B, scale, dtype)
    (q, q_size), (dB, dB_size) = product(rows(g), in_bf16([B])[0]), product(rows(g).t(), rows(h))
    body = lora_fused.bottleneck_grads_body(g, h, B, scale, dtype)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in body]
    check(map(by_rows, got), map(by_rows, body), [1.5 * q, dB], [1.5 * q_size, dB_size])


@needs_pairs
@given(case=cases())
@settings(max_examples=150)
def test_update(case):
    total, q, A = case
    total = total.contiguous()
    want, size = rows(total), rows(total).abs()
    for one, a in zip(q, in_bf16(A), strict=True):
        more, terms = product(rows(one), a)
        want, size = want + more, size + terms
    body = lora_split.input_grads_body(total, q, A, [], [])
    got = total.clone()
    pairs.update(got, q, A)
    check([by_rows(got)], [by_rows(body)], [want], [size])


@st.composite
def dora_cases(draw):
    """g or y, z, bias, h, B, magnitude, norm, scale of one site, and whether z is a base."""
    M, N, r = draw(ROWS), draw(WIDTHS), draw(st.sampled_from([1, 2, 3, 8, 9, 16, 17, 33, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(*shape, dtype=BF16):
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
        part = wide[..., : shape[-1]]
        return part if draw(st.booleans()) else part.contiguous()

    factors, of_base = draw(st.sampled_from([torch.float32, BF16, torch.float64])), draw(st.booleans())
    bias = None if of_base or draw(st.booleans()) else numbers(N, dtype=draw(st.sampled_from([BF16, torch.float32])))
    B = numbers(r, N, dtype=factors).t() if draw(st.booleans()) else numbers(N, r, dtype=factors)
    magnitude, norm = numbers(N, dtype=factors), numbers(N, dtype=torch.float32).abs() + 0.5
    lead = (2, M // 2) if M % 2 == 0 and draw(st.booleans()) else (M,)
    large = [numbers(*lead, N), numbers(*lead, N)]
    return *large, bias, numbers(*lead, r), B, magnitude, norm, torch.full((1,), 1.5, dtype=torch.float64), of_base


def in_fp64(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


@needs_pairs
@given(case=dora_cases())
@settings(max_examples=150)
def test_dora_expand(case):
    y, z, bias, h, B, magnitude, norm, _, of_base = case
    got = pairs.dora_expand(y, z if of_base else None, bias, h, B, magnitude, norm)
    body = dora_expand.expand_body(y, z if of_base else None, bias, h, B, magnitude, norm)
    wide, values, m, n = in_fp64((y, z, magnitude, norm))
    c, product = m / n, rows(h) @ in_bf16([B])[0].t()
    terms = [rows(wide), (c - 1) * rows(values if of_base else wide), c * product]
    if bias is not None:
        terms.append(-(c - 1) * bias.double())
    parts = rows(values if of_base else wide).abs() + rows(h).abs() @ B.double().abs().t()
    size = rows(wide).abs() + (1 + c.abs()) * parts
    size = size if bias is None else size + (1 + c.abs()) * bias.double().abs()
    assert got.shape == y.shape and got.dtype == BF16
    check([by_rows(got)], [by_rows(body)], [sum(terms)], [size])


@needs_pairs
@given(case=dora_cases(), in_place=st.booleans())
@settings(max_examples=150)
def test_dora_output_grads(case, in_place):
    g, z, bias, h, B, magnitude, norm, scale, of_base = case
    if in_place:
        g = g.contiguous()
    body = dora_grads.grads_body(*case)
    dz = g.clone() if in_place else torch.empty(g.shape, dtype=BF16)
    q, dB, dm = pairs.dora_output_grads(dz if in_place else g, *case[1:], dz)
    c = magnitude.double() / norm.double()
    centred = rows(z) if bias is None else rows(z) - bias.double()
    cB, G, G_size = c[:, None] * B.double(), *product(rows(g).t(), rows(h))
    norms = norm.double()
    want = [1.5 * rows(g) @ cB, c[:, None] * G, (c - float(of_base)) * rows(g),
            ((rows(g) * centred).sum(0) + (G * B.double()).sum(1)) / norms]  # fmt: skip
    spread = rows(z).abs() if bias is None else rows(z).abs() + bias.double().abs()
    size = [1.5 * rows(g).abs() @ cB.abs(), c[:, None].abs() * G_size, (c.abs() + float(of_base)) * rows(g).abs(),
            ((rows(g).abs() * spread).sum(0) + (G_size * B.double().abs()).sum(1)) / norms]  # fmt: skip
    got = q, dB, dz, dm
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in body]
    # For factors in fp64 too they are made in fp32.
    got, body = ([t.float() if t.dtype == torch.float64 else t for t in each] for each in (got, body))
    check(map(by_rows, got), map(by_rows, body), [by_rows(t) for t in want], [by_rows(t) for t in size])


@needs_pairs
def test_the_same_numbers_in_every_run_and_by_any_number_of_threads_but_for_the_order_of_sums():
    torch.manual_seed(0)
    x, h, A = torch.randn(301, 515).to(BF16), [torch.randn(301, 16).to(BF16)] * 2, [torch.randn(16, 515)] * 2
    scale = torch.ones(1, dtype=torch.float64)

    def run():
        total, dz = x.clone(), torch.empty_like(x)
        pairs.update(total, h, A)
        columns = torch.linspace(0.5, 2, 515)
        q, dB, dm = pairs.dora_output_grads(x, x, None, h[0], A[0].t(), columns, columns.flip(0), scale, False, dz)
        later = torch.cat([dB.flatten(), dm])
        return [later, q, dz, pairs.dora_expand(x, None, None, h[0], A[0].t(), columns, columns.flip(0)),
                *pairs.shrink(x, A, [scale] * 2), *pairs.gradient(h, x, torch.float32), total,
                *pairs.both(x, h[0], A[0].t(), scale, torch.float32)]  # fmt: skip

    threads = torch.get_num_threads()
    try:
        found = {}
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found[count] = run()
            assert all(torch.equal(one, other) for one, other in zip(found[count], run(), strict=True))
    finally:
        torch.set_num_threads(threads)
    for count in (2, 3):
        sums, *others, dB = found[count]
        assert all(torch.equal(one, other) for one, other in zip(others, found[1][1:], strict=False))
        torch.testing.assert_close(dB, found[1][-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums, found[1][0], rtol=1e-5, atol=1e-4)


@needs_pairs
def test_numbers_that_are_not_finite_come_through():
    x = torch.ones(3, 40).to(BF16)
    x[1, 4], x[2, 8] = float("nan"), float("inf")
    h, total = pairs.shrink(x, [torch.ones(2, 40)], [torch.ones(1)])[0], x.clone()
    pairs.update(total, [torch.ones(3, 1).to(BF16)], [torch.ones(1, 40)])
    assert float(h[0, 0]) == 40 and bool(h[1].isnan().all()) and bool(h[2].isinf().all())
    assert bool(total[1, 4].isnan()) and bool(total[2, 8].isinf()) and int(total.isfinite().sum()) == 118


@needs_pairs
def test_sizes_that_do_not_fit_are_refused():
    x, q, one = torch.randn(6, 8).to(BF16), torch.randn(6, 2).to(BF16), torch.ones(1)
    for call in (
        lambda: pairs.shrink(x, [torch.randn(2, 4)], [one]),
        lambda: pairs.shrink(x, [torch.randn(4, 8)], [torch.ones(2)]),
        lambda: pairs.gradient([q[:1]], x, BF16),
        lambda: pairs.both(x, q, torch.randn(7, 2), one, BF16),
        lambda: pairs.update(x, [q[:1]], [torch.randn(2, 8)]),
        lambda: pairs.update(x, [q], [torch.randn(3, 8)]),
        lambda: pairs.both(x, q, torch.randn(8, 3), one, BF16),
        lambda: pairs.dora_expand(x, x[:2], None, q, torch.randn(8, 2), torch.ones(8), torch.ones(8)),
        lambda: pairs.dora_expand(x, None, None, q, torch.randn(8, 2), torch.ones(7), torch.ones(8)),
        lambda: pairs.dora_output_grads(
            x, x, None, q, torch.randn(8, 3), torch.ones(8), torch.ones(8), one, False, x.clone()
        ),
        lambda: pairs.dora_output_grads(
            x, x, None, q, torch.randn(8, 2), torch.ones(8), torch.ones(8), one, False, x.clone()[:3]
        ),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


def test_what_the_kernels_do_not_take_is_left_to_torch(monkeypatch):
    x = torch.randn(3, 4).to(BF16)

    def takes(x, ranks):
        h, B, columns = torch.randn(3, ranks), torch.randn(4, ranks), torch.ones(4)
        return registry.kernel_for("dora_expand", x.device, x, None, None, h, B, columns, columns) is not None

    assert takes(x, 3) == (pairs.library() is not None)
    assert not takes(x.float(), 3) and not takes(x.half(), 3) and not takes(x[:0], 3)
    assert not takes(x.to("meta"), 3)
    assert not takes(x, 0) and not takes(x, MOST_RANKS + 1), "wide enough for the libraries"
    monkeypatch.setattr(pairs, "library", lambda: None)
    assert not takes(x, 3)


def arguments_of(name, dtype):
    x, q, A = torch.randn(5, 8).to(dtype), [torch.randn(5, 3).to(dtype)], [torch.randn(3, 8)]
    one, columns = torch.ones(1, dtype=torch.float64), torch.rand(8) + 0.5
    return {
        "lora_shrink": (x, A, [one], [], []),
        "lora_factor_grads": (q, x, torch.float32, [], []),
        "lora_input_grads": (x, q, A, [], []),
        "lora_bottleneck_grads": (x, q[0], A[0].t(), one, torch.float32),
        "dora_expand": (x, None, None, q[0], A[0].t(), columns, columns.flip(0)),
        "dora_output_grads": (x, x, None, q[0], A[0].t(), columns, columns.flip(0), one, False),
        dora.DORA_ROW_NORM.name: (x, A[0], torch.randn(5, 3), one, False),
    }[name]


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


NAMES = ["lora_shrink", "lora_factor_grads", "lora_input_grads", "lora_bottleneck_grads", "dora_expand",
         "dora_output_grads"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_without_the_instructions_the_bodies_run(name, monkeypatch):
    args = arguments_of(name, BF16)
    with_kernel = dialect.get(name).overload(*args)
    # A CPU that emulates bf16 has another kernel for some of them.
    monkeypatch.setattr(table, "cpu_emulates", lambda dtype: False)
    assert (registry.kernel_for(name, torch.device("cpu"), *args) is not None) == (pairs.library() is not None)
    monkeypatch.setattr(pairs, "library", lambda: None)
    assert registry.kernel_for(name, torch.device("cpu"), *args) is None
    python = getattr(torch.ops.adaptc_python, name)
    torch.testing.assert_close(flat(with_kernel), flat(python(*args)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", [*NAMES, "dora_row_norm"])
def test_what_the_library_does_not_take_python_does(name, dtype):
    """After the library has taken the ops over."""
    pairs.library()
    args = arguments_of(name, dtype)
    got, want = (flat(run(*args)) for run in (dialect.get(name).overload, dialect.get(name).body))
    assert [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


@needs_pairs
@pytest.mark.parametrize("name", NAMES[:2])
def test_dropouts_go_elsewhere(name):
    seed, rates = [torch.tensor([5])], [0.5]
    *args, _, _ = arguments_of(name, BF16)
    got, want = (flat(run(*args, seed, rates)) for run in (dialect.get(name).overload, dialect.get(name).body))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(got[0], flat(dialect.get(name).overload(*args, [], []))[0])
