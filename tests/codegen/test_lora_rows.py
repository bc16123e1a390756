"""The C++ kernels of LoRA by rows, at sizes with whole and cut tiles, against fp64 and the op's body."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.codegen.cpp import lora_rows
from adaptc.ir import dialect
from adaptc.ir.ops.lora_rows import body, grads_body
from tests.codegen.test_skinny import check

SIZES = st.sampled_from([1, 2, 5, 6, 7, 12, 13, 31, 64, 130])
WIDTHS = st.sampled_from([1, 3, 7, 8, 15, 16, 17, 63, 64, 65, 100, 129, 257, 513, 1030])
RANKS = st.lists(st.sampled_from([1, 3, 4, 8, 9, 16, 17, 24, 33]), min_size=1, max_size=5)
SPREADS = ("drawn", "stretches", "one each", "all of one", "no adapter", "base first", "base last", "skewed")


def spread(draw, kind, M, count):
    """Numbers of rows, of adapters 0, ..., count - 1 and what is none."""
    none = count + 3
    if kind == "drawn":
        return [draw(st.sampled_from([*range(count), none])) for _ in range(M)]
    if kind == "stretches":
        return [m * (count + 1) // M for m in range(M)]
    if kind == "one each":
        return [m if m < count else none for m in range(M)]
    if kind == "skewed":
        return [draw(st.integers(0, count)) if m % 7 == 0 else 0 for m in range(M)]
    if kind in ("base first", "base last"):
        ids = [none if m < M // 2 else m % count for m in range(M)]
        return ids if kind == "base first" else ids[::-1]
    return [none if kind == "no adapter" else count - 1] * M


@st.composite
def cases(draw):
    """The arguments of ``lora_rows``."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    factors = draw(st.sampled_from([dtype, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    M, K, N, ranks = draw(SIZES), draw(WIDTHS), draw(WIDTHS), draw(RANKS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*shape, dtype=dtype):
        way = draw(st.sampled_from(["contiguous", "wider", "turned"]))
        if way == "wider":
            shape = (*shape[:-1], 2 * shape[-1])
        made = torch.randn(shape[::-1] if way == "turned" else shape, generator=generator, dtype=torch.float64)
        made = made.to(dtype)
        return made.t() if way == "turned" else made[..., : shape[-1] // 2] if way == "wider" else made

    numbers = draw(st.permutations(range(len(ranks))))
    ids = torch.tensor(spread(draw, draw(st.sampled_from(SPREADS)), M, len(ranks)))
    A = [tensor(r, K, dtype=factors) for r in ranks]
    B = [tensor(N, r, dtype=factors) for r in ranks]
    scale = [torch.tensor([0.25 + i], dtype=torch.float64) for i in range(len(ranks))]
    return tensor(M, K), tensor(M, N), A, B, scale, ids, list(numbers)


def rounded(x, y, A, B, *rest):
    """The factors in the dtype in which the body computes, so that all compute with the same numbers."""
    return x, y, [a.to(x.dtype) for a in A], [b.to(x.dtype) for b in B], *rest


def wide(*args, of=torch.Tensor.double):
    """All floating-point tensors by ``of``."""
    if len(args) == 1:
        (t,) = args
        if isinstance(t, list):
            return [wide(one, of=of) for one in t]
        return of(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
    return [wide(t, of=of) for t in args]


def size(t):
    return t.double().abs()


@given(case=cases())
@settings(max_examples=150)
def test_forward(case):
    x, y, A, B, scale, ids, numbers = case = rounded(*case)
    out, h = lora_rows.forward(*case)
    want = body(*wide(*case))
    terms = body(*wide(*case, of=size))
    # h is rounded before it is expanded, in either: the exact value of that is what the sums are compared with.
    exact = want[0]
    check([h], [body(*case)[1]], [want[1]], [terms[1]])
    check([out], [body(*case)[0]], [exact], [terms[0]])
    assert (out.dtype, h.dtype) == (x.dtype, x.dtype)
    base = torch.tensor([number not in numbers for number in ids.tolist()])
    assert torch.equal(out[base].view(torch.uint8), y[base].contiguous().view(torch.uint8)) and not h[base].any()


@given(case=cases(), data=st.data())
@settings(max_examples=150)
def test_backward(case, data):
    x, g, A, B, scale, ids, numbers = case = rounded(*case)
    h = body(*case)[1]
    need_x = data.draw(st.booleans())
    need = data.draw(st.lists(st.booleans(), min_size=2 * len(A), max_size=2 * len(A)))
    args = g, x, h, A, B, scale, ids, numbers, need_x, need
    got = lora_rows.backward(*args)
    want, terms = grads_body(*wide(*args)), grads_body(*wide(*args, of=size))
    check(got, grads_body(*args), want, terms)
    assert [t.dtype for t in got] == [x.dtype] * len(got)
    if need_x:
        assert not got[0][torch.tensor([number not in numbers for number in ids.tolist()])].any()


@given(case=cases())
@settings(max_examples=60)
def test_in_place(case):
    """The same bits as in new memory."""
    x, y, *_ = case
    out, h = lora_rows.forward(*case)
    memory = y.clone(memory_format=torch.contiguous_format)
    assert torch.equal(lora_rows.add(memory.view(1, *y.shape), x, *case[2:]), h) and torch.equal(memory, out)


BITS = {torch.float32: (torch.int32, [0x7FC01234, -0x3FFEDD, 0x7F800000, -0x800000, -0x80000000]),
        torch.bfloat16: (torch.int16, [0x7FC5, -0x3B, 0x7F80, -0x80, -0x8000])}  # fmt: skip


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("rows", [3, 30])
def test_what_is_not_finite_stays_in_its_row_and_rows_of_the_base_are_theirs_bit_for_bit(dtype, rows):
    torch.manual_seed(0)
    integer, values = BITS[dtype]
    ids = torch.arange(4 * rows) % 4
    x, y = torch.randn(4 * rows, 40).to(dtype), torch.randn(4 * rows, 24).to(dtype)
    A, B = [torch.randn(8, 40).to(dtype) for _ in range(3)], [torch.randn(24, 8).to(dtype) for _ in range(3)]
    args = A, B, [torch.ones(1, dtype=torch.float64)] * 3, ids, [0, 1, 2]
    want, clean_h = lora_rows.forward(x, y, *args)
    clean = lora_rows.backward(y, x, clean_h, *args, True, [True] * 6)
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[ids == 1], bad_x[ids == 3] = torch.inf, torch.nan  # of an adapter, and of none
    bad_y.view(integer)[ids == 3] = torch.tensor(values * 5, dtype=integer)[:24]
    A[1][:, 3] = torch.nan
    got, h = lora_rows.forward(bad_x, bad_y, *args)
    assert torch.equal(got[ids == 3].view(integer), bad_y[ids == 3].view(integer)) and not h[ids == 3].any()
    for number in (0, 2):
        assert torch.equal(got[ids == number], want[ids == number])
    assert not got[ids == 1].isfinite().any()
    dx, *factors = lora_rows.backward(bad_y, bad_x, h, *args, True, [True] * 6)
    for number in (0, 2):
        assert torch.equal(dx[ids == number], clean[0][ids == number])
        assert torch.equal(factors[number], clean[1 + number]) and torch.equal(factors[3 + number], clean[4 + number])
    assert not dx[ids == 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skew", [False, True])
def test_the_bits_do_not_depend_on_the_threads(dtype, skew):
    """In memory that calls before left NaN in."""
    torch.manual_seed(0)
    M, K, N, ranks = 1003, 513, 260, [8, 33, 16, 3]
    ids = torch.randint(0, 5, (M,)) if not skew else torch.where(torch.rand(M) < 0.9, 1, torch.randint(0, 5, (M,)))
    ids[:3] = torch.tensor([7, 7, 9])  # few rows
    x, g = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B = [torch.randn(r, K).to(dtype) for r in [*ranks, 8]], [torch.randn(N, r).to(dtype) for r in [*ranks, 8]]
    args = A, B, [torch.full((1,), 0.75, dtype=torch.float64)] * 5, ids, [0, 1, 2, 3, 7]
    found, before = [], torch.get_num_threads()
    nan = [[torch.full_like(t, torch.nan) for t in one] for one in (A, B)]
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            lora_rows.forward(x, g, *nan, *args[2:])
            out, h = lora_rows.forward(x, g, *args)
            lora_rows.backward(torch.full_like(g, torch.nan), x, h, *nan, *args[2:], True, [True] * 10)
            found.append([out, h, *lora_rows.backward(g, x, h, *args, True, [True] * 10)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    want = body(*wide(x, g, *args))[0]
    assert float((found[0][0].double() - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 6e-3)


def test_long_sums_round_no_more_than_the_libraries():
    """Of wide rows and of many, all of one sign, whose adapters have few rows and many."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    ids = torch.tensor([0] * 2 + [1] * 40)
    args = [rand(5, 20011)] * 2, [rand(20, 5)] * 2, [torch.ones(1, dtype=torch.float64)] * 2, ids, [0, 1]
    x, y = rand(42, 20011), rand(42, 20)
    error = lambda got, want: float((got.double() - want).norm() / want.norm())  # noqa: E731
    want, other, got = body(*wide(x, y, *args))[1], body(x, y, *args)[1], lora_rows.forward(x, y, *args)[1]
    assert error(got, want) <= 1.5 * error(other, want)
    ids = torch.zeros(20011, dtype=torch.int64)
    args = [rand(5, 20)], [rand(20, 5)], [torch.ones(1, dtype=torch.float64)], ids, [0]
    given = rand(20011, 20), rand(20011, 20), rand(20011, 5), *args, False, [True, True]
    pairs = zip(lora_rows.backward(*given), grads_body(*given), grads_body(*wide(*given)), strict=True)
    assert all(error(got, want) <= 3 * error(other, want) for got, other, want in pairs)


def test_what_does_not_fit_is_named():
    x, y, one, ids = torch.randn(4, 6), torch.randn(4, 5), [torch.ones(1)], torch.zeros(4, dtype=torch.int64)
    A, B = [torch.randn(2, 6)], [torch.randn(5, 2)]
    for args in (
        (x, y, [torch.randn(2, 5)], B, one, ids, [0]),
        (x, y, A, [torch.randn(5, 3)], one, ids, [0]),
        (x, y, A, B, [torch.ones(3)], ids, [0]),
        (x, y, A, B, one, ids[:3], [0]),
        (x, y, A, B, one, ids, [0, 1]),
        (x, y[:3], A, B, one, ids, [0]),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            lora_rows.forward(*args)
    with pytest.raises(RuntimeError, match="expected"):
        lora_rows.backward(y, x, torch.randn(4, 3), A, B, one, ids, [0], True, [True, True])


@pytest.mark.parametrize("name", ["lora_rows", "lora_rows_grads"])
def test_without_a_compiler_the_products_of_the_library_run(name, monkeypatch):
    from adaptc.codegen.ops import lora_rows as ops
    from adaptc.codegen.ops import registry

    torch.manual_seed(0)
    x, y, h, ids = torch.randn(5, 8), torch.randn(5, 6), torch.randn(5, 3), torch.tensor([1, 0, 2, 1, 1])
    factors = [torch.randn(3, 8), torch.randn(2, 8)], [torch.randn(6, 3), torch.randn(6, 2)]
    rest = *factors, [torch.ones(1)] * 2, ids, [0, 1]
    args = (x, y, *rest) if name == "lora_rows" else (y, x, h, *rest, True, [True] * 4)
    assert registry.kernel_for(name, x.device, *args) in (lora_rows.forward, lora_rows.backward)
    with_kernel = dialect.get(name).overload(*args)
    monkeypatch.setattr(lora_rows, "library", lambda: None)
    plain = registry.kernel_for(name, x.device, *args)
    assert plain in (ops.products, ops.grads)
    for one, other in zip(with_kernel, plain(*args), strict=True):
        torch.testing.assert_close(one, other)
