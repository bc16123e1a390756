"""Products with one small side (tall and skinny: a rank), in fp32 sums, with dropout where the input is read.

    shrink     h_g   = scale_g * (D_g . x) A_g^T        x (M, K), A_g (r_g, K), h_g (M, r_g)
    gradient   d_g   = h_g^T (D_g . x)                  h_g (M, r_g), x (M, K), d_g (r_g, K)
    update     total += sum_g D_g . (q_g A_g)           q_g (M, r_g), A_g (r_g, K), total (M, K)

D_g is the mask of ``adaptc.ir.dropout`` over 1 - p, or one. x and total are read once for all g: rows that fit a cache
are copied, with the mask or in fp32, and each register tile of the result is summed from the copy. Libraries cut their
tiles for wide results, and cannot drop.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.codegen import torch_internals
from adaptc.codegen.cpp.elements import ELEMENTS, kept_scale, threshold

#: The constants of the hash are those of ``adaptc.ir.dropout``.
SOURCE = ELEMENTS + r"""
#include <algorithm>
#include <vector>

// A sum of products is one instruction and rounds once.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int W = 8, ROWS = 6;
#else
constexpr int W = 4, ROWS = 6;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(W * 4)));

static inline vec read(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void write(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
static inline vec splat(float v) { return v - vec{}; }  // v + 0 is not v where v is -0: an instruction more


// One adapter: its columns of the packed factors, its dropout (seed null: none), its part of the result.
struct Group {
    int64_t rank, first;  // columns, and the first of them among the padded columns of all groups
    const int64_t* seed;
    uint32_t least;
    float keep;           // 1 / (1 - p)
    void* part;           // shrink: h; gradient: d
};

struct Row { uint32_t first, second; };
static inline Row row_keys(const Group& g, int64_t row) {
    const uint64_t seed = static_cast<uint64_t>(*g.seed);
    const uint32_t high = static_cast<uint32_t>(seed >> 32), low = static_cast<uint32_t>(seed);
    const uint32_t r = static_cast<uint32_t>(row);
    return {r * 0xC13FA9A9u + (low + high * 0x85EBCA6Bu), r * 0xD1B54A33u + high};
}
// For W columns from one on: v * keep where an element is kept, else 0.
static inline vec kept(vec v, uint32_t column, Row k, uint32_t least, float keep) {
    words h;
    for (int l = 0; l < W; ++l) h[l] = l;
    h = (h + column) * 0x9E3779B1u + k.first;
    h = ((h ^ (h >> 16)) * 0x7FEB352Du) ^ k.second;
    h = ((h ^ (h >> 15)) * 0x846CA68Bu) ^ 0x80000000u;
    return (vec)((words)(v * splat(keep)) & (words)(h >= least));
}

template <typename T>
static void copy_row(const T* from, float* to, int64_t row, int64_t first, int64_t count, const Group* g) {
    if (g == nullptr) {
        for (int64_t j = 0; j < count; ++j) to[j] = load(from + j);
        return;
    }
    const Row keys = row_keys(*g, row);
    const uint32_t least = g->least;
    const float keep = g->keep;
    for (int64_t j = 0; j < count; j += W) {
        float part[W] = {};
        for (int64_t l = 0; l < W && j + l < count; ++l) part[l] = load(from + j + l);
        const vec v = kept(read(part), static_cast<uint32_t>(first + j), keys, least, keep);
        if (j + W <= count) {
            write(to + j, v);
        } else {
            write(part, v);
            std::copy(part, part + (count - j), to + j);
        }
    }
}

// out[N, V*W] += left[N, depth] right[depth, V*W], left's elements at (i * left_row + k * left_step)
template <int N, int V>
static inline void tile(const float* left, int64_t left_row, int64_t left_step, const float* right, int64_t right_row,
                        float* out, int64_t out_row, int64_t depth) {
    vec sum[N][V];
    for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = read(out + i * out_row + v * W);
    for (int64_t k = 0; k < depth; ++k) {
        vec b[V];
        for (int v = 0; v < V; ++v) b[v] = read(right + k * right_row + v * W);
        for (int i = 0; i < N; ++i) {
            const vec a = splat(left[i * left_row + k * left_step]);
            for (int v = 0; v < V; ++v) sum[i][v] += a * b[v];
        }
    }
    for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) write(out + i * out_row + v * W, sum[i][v]);
}

template <int V>
static void row_tiles(const float* x, int64_t ldx, const float* a, int64_t lda, float* h, int64_t ldh, int64_t depth,
                      int64_t rows) {
    if (rows == ROWS) return tile<ROWS, V>(x, ldx, 1, a, lda, h, ldh, depth);
    for (int64_t i = 0; i < rows; ++i) tile<1, V>(x + i * ldx, ldx, 1, a, lda, h + i * ldh, ldh, depth);
}

static int64_t padded(const Group& g, int64_t to) { return (g.rank + to - 1) / to * to; }

template <typename T>
static void shrink(const T* x, int64_t rows, int64_t width, int64_t ldx, const float* a, int64_t columns,
                   const float* scale, const Group* groups, int64_t count, int threads) {
    constexpr int64_t DEPTH = 512;
    const bool dropped = groups[0].seed != nullptr, direct = sizeof(T) == 4 && !dropped;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(direct ? 0 : ROWS * DEPTH), h(ROWS * columns);
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            std::fill(h.begin(), h.end(), 0.0f);
            for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
                const int64_t depth = std::min<int64_t>(DEPTH, width - k0);
                const float* from = direct ? reinterpret_cast<const float*>(x + i0 * ldx + k0) : copy.data();
                for (int64_t g = 0; g < count; ++g) {
                    if (!direct && (dropped || g == 0))
                        for (int64_t i = 0; i < n; ++i)
                            copy_row(x + (i0 + i) * ldx + k0, copy.data() + i * DEPTH, i0 + i, k0, depth,
                                     dropped ? groups + g : nullptr);
                    const int64_t ld = direct ? ldx : DEPTH;
                    int64_t c = groups[g].first;
                    const int64_t end = c + padded(groups[g], W);
                    for (; c + 2 * W <= end; c += 2 * W)
                        row_tiles<2>(from, ld, a + k0 * columns + c, columns, h.data() + c, columns, depth, n);
                    if (c < end) row_tiles<1>(from, ld, a + k0 * columns + c, columns, h.data() + c, columns, depth, n);
                }
            }
            for (int64_t g = 0; g < count; ++g) {
                const int64_t rank = groups[g].rank, first = groups[g].first;
                T* part = static_cast<T*>(groups[g].part);
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t c = 0; c < rank; ++c)
                        store(part + (i0 + i) * rank + c, h[i * columns + first + c] * scale[first + c]);
            }
        }
    }
}

template <typename T>
static void gradient(const float* h, int64_t columns, const T* x, int64_t rows, int64_t width, int64_t ldx,
                     const Group* groups, int64_t count, int threads) {
    constexpr int64_t BLOCK = 128, PANEL = 4 * 2 * W > 64 ? 4 * 2 * W : 64;
    const bool dropped = groups[0].seed != nullptr;
    const int64_t panels = (width + PANEL - 1) / PANEL;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(BLOCK * PANEL), sums(columns * PANEL);
        #pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t c0 = p * PANEL, cols = std::min<int64_t>(PANEL, width - c0);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t m0 = 0; m0 < rows; m0 += BLOCK) {
                const int64_t n = std::min<int64_t>(BLOCK, rows - m0);
                for (int64_t g = 0; g < count; ++g) {
                    if (dropped || g == 0)
                        for (int64_t i = 0; i < n; ++i)
                            copy_row(x + (m0 + i) * ldx + c0, copy.data() + i * PANEL, m0 + i, c0, cols,
                                     dropped ? groups + g : nullptr);
                    const int64_t first = groups[g].first, end = first + padded(groups[g], 4);
                    for (int64_t c = 0; c < cols; c += 2 * W)
                        for (int64_t r = first; r < end; r += 4)
                            tile<4, 2>(h + m0 * columns + r, 1, columns, copy.data() + c, PANEL,
                                       sums.data() + r * PANEL + c, PANEL, n);
                }
            }
            for (int64_t g = 0; g < count; ++g) {
                float* part = static_cast<float*>(groups[g].part);
                for (int64_t r = 0; r < groups[g].rank; ++r)
                    for (int64_t c = 0; c < cols; ++c)
                        part[r * width + c0 + c] = sums[(groups[g].first + r) * PANEL + c];
            }
        }
    }
}

// a: factors packed as rows, (sum of ranks, stride); q: (rows, sum of ranks), both fp32.
template <typename T>
static void update(T* total, int64_t rows, int64_t width, const float* q, int64_t ranks, const float* a, int64_t lda,
                   const Group* groups, int64_t count, int threads) {
    constexpr int64_t PANEL = 2 * W;
    const bool dropped = groups[0].seed != nullptr;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
        float sums[ROWS * PANEL], product[ROWS * PANEL];
        for (int64_t c0 = 0; c0 < width; c0 += PANEL) {
            const int64_t cols = std::min<int64_t>(PANEL, width - c0);
            for (int64_t i = 0; i < n; ++i)
                for (int64_t c = 0; c < cols; ++c) sums[i * PANEL + c] = load(total + (i0 + i) * width + c0 + c);
            for (int64_t g = 0; g < count; ++g) {
                float* to = dropped ? product : sums;
                if (dropped) std::fill(product, product + ROWS * PANEL, 0.0f);
                row_tiles<2>(q + i0 * ranks + groups[g].first, ranks, a + groups[g].first * lda + c0, lda, to, PANEL,
                             groups[g].rank, n);
                for (int64_t i = 0; dropped && i < n; ++i) {
                    const Row keys = row_keys(groups[g], i0 + i);
                    const uint32_t least = groups[g].least;
                    const float keep = groups[g].keep;
                    for (int64_t c = 0; c < PANEL; c += W)
                        write(sums + i * PANEL + c, read(sums + i * PANEL + c) +
                              kept(read(product + i * PANEL + c), static_cast<uint32_t>(c0 + c), keys, least, keep));
                }
            }
            for (int64_t i = 0; i < n; ++i)
                for (int64_t c = 0; c < cols; ++c) store(total + (i0 + i) * width + c0 + c, sums[i * PANEL + c]);
        }
    }
}

extern "C" int lanes() { return W; }
#define EXPORT(T, NAME)                                                                                               \
    extern "C" void shrink_##NAME(const void* x, int64_t rows, int64_t width, int64_t ldx, const float* a,             \
                                  int64_t columns, const float* scale, const Group* groups, int64_t count,            \
                                  int threads) {                                                                      \
        shrink(static_cast<const T*>(x), rows, width, ldx, a, columns, scale, groups, count, threads);                \
    }                                                                                                                 \
    extern "C" void gradient_##NAME(const float* h, int64_t columns, const void* x, int64_t rows, int64_t width,      \
                                    int64_t ldx, const Group* groups, int64_t count, int threads) {                   \
        gradient(h, columns, static_cast<const T*>(x), rows, width, ldx, groups, count, threads);                     \
    }                                                                                                                 \
    extern "C" void update_##NAME(void* total, int64_t rows, int64_t width, const float* q, int64_t ranks,            \
                                  const float* a, int64_t lda, const Group* groups, int64_t count, int threads) {     \
        update(static_cast<T*>(total), rows, width, q, ranks, a, lda, groups, count, threads);                        \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
"""
#: What x, h and total may be made of -> how the functions of this dtype are called.
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
#: Dropout of one input: (seed (1,) int64, p).
Dropout = tuple[torch.Tensor, float]
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
    found = torch_internals.load_cpp(SOURCE)
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
    scales = torch.ones(columns)
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
    packed = torch.zeros(x.shape[0], columns)
    for first, rank, one in zip(firsts, ranks, h, strict=True):
        packed[:, first : first + rank] = one
    parts = [torch.empty(rank, x.shape[1]) for rank in ranks]
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
    factors = torch.zeros(columns, -(-width // panel) * panel)
    factors[:, :width] = torch.cat([a.detach() for a in A])
    left = torch.cat([one.detach() for one in q], dim=1).to(torch.float32).contiguous()
    getattr(library(), f"update_{DTYPES[total.dtype]}")(
        total.data_ptr(), *total.shape, left.data_ptr(), columns, factors.data_ptr(), factors.shape[1],
        _groups(firsts, q, ranks, dropouts), len(q), _threads(total, columns),
    )  # fmt: skip


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
    packed = torch.zeros(A[0].shape[1], columns)
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
