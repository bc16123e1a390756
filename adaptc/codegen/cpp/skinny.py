"""Products with one small side (tall and skinny: a rank), in fp32 sums, with dropout where the input is read.

    shrink     h_g   = scale_g * (D_g . x) A_g^T        x (M, K), A_g (r_g, K), h_g (M, r_g)
    gradient   d_g   = h_g^T (D_g . x)                  h_g (M, r_g), x (M, K), d_g (r_g, K)
    update     total += sum_g D_g . (q_g A_g)           q_g (M, r_g), A_g (r_g, K), total (M, K)
    row_norms  n_i   = |W_i + s (B A)_i|                W (N, K), A (r, K), B (N, r), n (N,)

D_g is the mask of ``adaptc.ir.dropout`` over 1 - p, or one. x, W and total are read once: rows that fit a cache are
copied, with the mask or in fp32, and each register tile of the result is summed from the copy. Libraries cut their
tiles for wide results, and cannot drop. n_i^2 = |W_i|^2 + 2 s B_i . (A W^T)_i + s^2 B_i (A A^T) B_i^T.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.codegen import torch_internals
from adaptc.codegen.cpp.elements import kept_scale, threshold
from adaptc.codegen.cpp.skinny_source import KERNELS, SOURCE

#: What x, h and total may be made of -> how the functions of this dtype are called.
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
#: Dropout of one input: (seed (1,) int64, p).
Dropout = tuple[torch.Tensor, float]
#: What the kernels read and write besides x, whatever the process's defaults are.
_FP32: Any = {"dtype": torch.float32, "device": "cpu"}
_ones, _zeros, _empty = (functools.partial(make, **_FP32) for make in (torch.ones, torch.zeros, torch.empty))
#: Operations below which a second thread costs more than it does.
_GRAIN = 1 << 18


class _Group(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int64), ("first", ctypes.c_int64), ("seed", ctypes.c_void_p), ("least", ctypes.c_uint32),
        ("keep", ctypes.c_float), ("part", ctypes.c_void_p),
    )  # fmt: skip


@functools.cache
def library() -> Any:
    """The compiled kernels; None without a C++ compiler, or with one that has no vector types."""
    found = torch_internals.load_cpp(SOURCE, KERNELS)
    if found is None:
        return None
    pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name in DTYPES.values():
        for kind, types in {
            "shrink": (pointer, size, size, size, pointer, size, pointer, pointer, size, threads),
            "gradient": (pointer, size, pointer, size, size, size, pointer, size, threads),
            "update": (pointer, size, size, pointer, size, pointer, size, pointer, size, threads),
        }.items():
            function = getattr(found, f"{kind}_{name}")
            function.argtypes, function.restype = types, None
    return found


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels can read ``x``: a plain CPU tensor of a dtype that they know, not empty."""
    # Of a subclass the memory may be elsewhere, or nowhere.
    plain = type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype in DTYPES
    return plain and x.numel() > 0 and library() is not None


def shrink(
    x: torch.Tensor, A: Sequence[torch.Tensor], scale: Sequence[torch.Tensor | None] = (),
    dropouts: Sequence[Dropout] = (),
) -> list[torch.Tensor]:  # fmt: skip
    """h of each of ``A`` (r_g, K), in the dtype of ``x`` (M, K)."""
    x = _by_rows(x)
    ranks = [a.shape[0] for a in A]
    firsts, columns = _places(ranks, library().lanes())
    packed = _columns(A, firsts, columns)
    scales = _ones(columns)
    for first, rank, one in zip(firsts, ranks, scale, strict=False):
        if one is not None:
            scales[first : first + rank] = one
    parts = [x.new_empty(x.shape[0], rank) for rank in ranks]
    getattr(library(), f"shrink_{DTYPES[x.dtype]}")(
        x.data_ptr(), *x.shape, x.stride(0), packed.data_ptr(), columns, scales.data_ptr(),
        _groups(firsts, parts, ranks, dropouts), len(A), _threads(x, columns),
    )  # fmt: skip
    return parts


def gradient(
    h: Sequence[torch.Tensor], x: torch.Tensor, dropouts: Sequence[Dropout] = ()
) -> list[torch.Tensor]:
    """d (r_g, K) of each of ``h`` (M, r_g), in fp32."""
    x = _by_rows(x)
    ranks = [one.shape[1] for one in h]
    firsts, columns = _places(ranks, 4)
    packed = _zeros(x.shape[0], columns)
    for first, rank, one in zip(firsts, ranks, h, strict=True):
        packed[:, first : first + rank] = one
    parts = [_empty(rank, x.shape[1]) for rank in ranks]
    groups = _groups(firsts, parts, ranks, dropouts)
    getattr(library(), f"gradient_{DTYPES[x.dtype]}")(
        packed.data_ptr(), columns, x.data_ptr(), *x.shape, x.stride(0), groups, len(h), _threads(x, columns)
    )
    return parts


def update(
    total: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor], dropouts: Sequence[Dropout] = ()
) -> None:
    """Add q A to ``total`` (M, K), which is contiguous, for each ``q`` (M, r_g) and ``A`` (r_g, K)."""
    width, panel = total.shape[1], 2 * library().lanes()
    ranks = [one.shape[1] for one in q]
    firsts, columns = _places(ranks, 1)
    # Rows of whole panels: the last one is read to its end.
    factors = _zeros(columns, -(-width // panel) * panel)
    factors[:, :width] = torch.cat([a.detach() for a in A])
    left = torch.cat([one.detach() for one in q], dim=1).to(torch.float32).contiguous()
    getattr(library(), f"update_{DTYPES[total.dtype]}")(
        total.data_ptr(), *total.shape, left.data_ptr(), columns, factors.data_ptr(), factors.shape[1],
        _groups(firsts, q, ranks, dropouts), len(q), _threads(total, columns),
    )  # fmt: skip


def row_norms(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """n (N,) in fp32; ``scale`` is one number. None where torch's stable interface is too old for it."""
    if library() is None or not hasattr(torch.ops.adaptc_skinny, "row_norms"):
        return None
    return torch.ops.adaptc_skinny.row_norms(W.detach(), A.detach(), B.detach(), scale)  # type: ignore[no-any-return]


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _places(ranks: Sequence[int], multiple: int) -> tuple[list[int], int]:
    """Where each group begins when each takes a multiple of columns, and how many there are."""
    firsts, total = [], 0
    for rank in ranks:
        firsts.append(total)
        total += -(-rank // multiple) * multiple
    return firsts, total


def _columns(A: Sequence[torch.Tensor], firsts: Sequence[int], columns: int) -> torch.Tensor:
    """The factors side by side, (K, columns) in fp32, zero where there is padding."""
    if len(A) == 1 and A[0].shape[0] == columns:
        return A[0].detach().t().to(torch.float32).contiguous()
    packed = _zeros(A[0].shape[1], columns)
    for first, a in zip(firsts, A, strict=True):
        packed[:, first : first + a.shape[0]] = a.detach().t()
    return packed


def _groups(
    firsts: Sequence[int], parts: Sequence[torch.Tensor], ranks: Sequence[int], dropouts: Sequence[Dropout]
) -> Any:
    groups = (_Group * len(parts))()
    for group, first, part, rank in zip(groups, firsts, parts, ranks, strict=True):
        group.rank, group.first, group.part = rank, first, part.data_ptr()
    for group, (seed, p) in zip(groups, dropouts, strict=False):
        group.seed = seed.data_ptr()
        group.least, group.keep = threshold(p), kept_scale(p)
    return groups


def _threads(x: torch.Tensor, columns: int) -> int:
    return torch.get_num_threads() if x.numel() * columns > _GRAIN else 1
