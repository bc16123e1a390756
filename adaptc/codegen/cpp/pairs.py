"""Products of bf16 with one small side (a rank), two numbers at a time, in fp32 sums.

    shrink      h_g = scale_g * (x A_g^T)          x (..., K), A_g (r_g, K) -> h_g (..., r_g) in bf16
    gradient    d_g = h_g^T x                      h_g (..., r_g), x (..., K) -> d_g (r_g, K) of ``dtype``
    both        q = scale * (g B),  dB = g^T h     g (..., N), B (N, r), h (..., r) -> q (..., r) in bf16, dB (N, r)
    update      total += sum_g q_g A_g             q_g (..., r_g), A_g (r_g, K), total (..., K) in bf16

For CPUs with AVX512_BF16. x, g and total are read once, where their rows lie at one distance, else from a copy. Factors
may be fp32 or bf16 and have any strides: they are rounded to bf16 as they are packed. Numbers below the smallest normal
one may come out as zero.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.codegen import torch_internals
from adaptc.codegen.cpp.pairs_source import SOURCE

#: What the kernels read as a factor and write as a gradient.
_FLOATS = (torch.float32, torch.bfloat16)
#: Operations below which a second thread costs more than it does.
_GRAIN = 1 << 19
#: Ranks, of all sites together, up to which the libraries were slower wherever it was measured.
MOST_RANKS = 64
#: How many rows a thread has at least where threads share the rows; below two threads' worth there is one.
_ROWS_OF_A_THREAD = 96
#: What the kernels take an operand or a result for; ``Factor`` and ``Part`` of the C++.
_Fields = tuple[int, int, int, int, int]


@functools.cache
def library() -> Any:
    """The compiled kernels; None without a C++ compiler, or for a CPU that lacks the instructions."""
    if not torch_internals.has_avx512_bf16():
        return None
    found = torch_internals.load_cpp(SOURCE)
    if found is None or not found.lanes():
        return None
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.products.argtypes = (pointer, size, size, size, size, pointer, small, small, small)
    found.update.argtypes = (pointer, size, size, size, pointer, small)
    found.products.restype = found.update.restype = None
    return found


def takes(x: torch.Tensor, ranks: int) -> bool:
    """Whether the kernels can read ``x``, a plain tensor of bf16, not empty, on a CPU that has the instructions, and
    are fast for so many ``ranks``."""
    # Of a subclass the memory may be elsewhere, or nowhere.
    plain = type(x) is torch.Tensor and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return plain and 0 < ranks <= MOST_RANKS and x.numel() > 0 and library() is not None


# What is around the kernels is a good part of the time that they take: as few calls of torch as can be.


def shrink(x: torch.Tensor, A: Sequence[torch.Tensor], scale: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """h (..., r_g) of each of ``A`` (r_g, K)."""
    lead, x = x.shape[:-1], _by_rows(x)
    factors, scales = [_plain(a) for a in A], [_scales(s, a.shape[0]) for s, a in zip(scale, A, strict=True)]
    parts = [torch.empty((*lead, a.shape[0]), dtype=torch.bfloat16, device="cpu") for a in A]
    results = [_part(h, s) for h, s in zip(parts, scales, strict=True)]
    _products(x, [*(_factor(a, 0, x.shape[-1]) for a in factors), *results], len(A), shrinks=True)
    return parts


def gradient(h: Sequence[torch.Tensor], x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """d (r_g, K) of each of ``h`` (..., r_g)."""
    x, width = _by_rows(x), x.shape[-1]
    factors, made = [_rows(_plain(one)) for one in h], dtype if dtype in _FLOATS else torch.float32
    parts = [torch.empty((one.shape[1], width), dtype=made, device="cpu") for one in factors]
    results = [_part(d, by_rank=True) for d in parts]
    _products(x, [*(_factor(one, 1, x.numel() // width) for one in factors), *results], len(h), sums=True)
    return parts if made == dtype else [d.to(dtype) for d in parts]


def both(
    g: torch.Tensor, h: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a bottleneck (..., r) and of the factor ``B`` (N, r) behind it, in one pass over the output's
    ``g`` (..., N)."""
    lead, width, g = g.shape[:-1], g.shape[-1], _by_rows(g)
    B, h, scale = _plain(B), _rows(_plain(h)), _scales(scale, B.shape[1])
    made = dtype if dtype in _FLOATS else torch.float32
    q = torch.empty((*lead, B.shape[1]), dtype=torch.bfloat16, device="cpu")
    dB = torch.empty(B.shape, dtype=made, device="cpu")
    given = [_factor(B, 1, width), _part(q, scale), _factor(h, 1, g.numel() // width), _part(dB)]
    _products(g, given, 1, shrinks=True, sums=True)
    return q, dB if made == dtype else dB.to(dtype)


def update(total: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor]) -> None:
    """Add q A to ``total`` (..., K), which is contiguous, for each ``q`` (..., r_g) and ``A`` (r_g, K)."""
    left, right = [_rows(_plain(one)) for one in q], [_plain(a) for a in A]
    count, width = len(left), total.shape[-1]
    rows = total.numel() // width
    given = [*(_factor(one, 1, rows) for one in left), *(_factor(a, 0, width) for a in right)]
    threads = _threads(total, sum(one[1] for one in given[:count]))
    library().update(total.data_ptr(), rows, width, count, _array(given), threads)


def _products(
    x: torch.Tensor, given: Sequence[_Fields], count: int, *, shrinks: bool = False, sums: bool = False
) -> None:
    width = x.shape[-1]
    rows, stride = x.numel() // width, width if x.is_contiguous() else x.stride(0)
    threads = _threads(x, sum(one[1] for one in given[:count]) * (shrinks + sums))
    if shrinks and sums:  # each sums up by itself what it reads: not for a few rows
        threads = min(threads, -(-rows // _ROWS_OF_A_THREAD))
    library().products(x.data_ptr(), rows, width, stride, count, _array(given), shrinks, sums, threads)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` contiguous, or as rows that are, at any distance from each other."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _rows(factor: torch.Tensor) -> torch.Tensor:
    return factor if factor.dim() == 2 else factor.reshape(-1, factor.shape[-1])


def _plain(factor: torch.Tensor) -> torch.Tensor:
    return factor if factor.dtype in _FLOATS else factor.to(torch.float32)


def _scales(scale: torch.Tensor, rank: int) -> torch.Tensor:
    if scale.numel() not in (1, rank):
        raise RuntimeError(f"a product of rank {rank}: expected a scale of 1 or {rank} numbers, found {scale.numel()}")
    return scale if scale.dtype == torch.float64 and scale.is_contiguous() else scale.to(torch.float64).contiguous()


def _factor(t: torch.Tensor, small: int, size: int) -> _Fields:
    """``t`` (2-d) with its small side at dimension ``small`` and ``size`` on the other."""
    if t.shape[1 - small] != size or not t.is_cpu:
        where = f"a factor of shape {tuple(t.shape)} on {t.device}"
        raise RuntimeError(f"{where}: expected {size} at dimension {1 - small}, on the CPU")
    return t.data_ptr(), t.shape[small], t.stride(small), t.stride(1 - small), t.dtype == torch.bfloat16


def _part(t: torch.Tensor, scale: torch.Tensor | None = None, *, by_rank: bool = False) -> _Fields:
    scales = (0, 0) if scale is None else (scale.data_ptr(), scale.numel())
    return t.data_ptr(), *scales, t.dtype == torch.bfloat16, by_rank


def _array(items: Sequence[_Fields]) -> Any:
    flat = [field for item in items for field in item]
    return (ctypes.c_int64 * len(flat))(*flat)


def _threads(x: torch.Tensor, ranks: int) -> int:
    return torch.get_num_threads() if x.numel() * ranks > _GRAIN else 1
