// The kernels of the products with one small side; skinny.py says what each computes.
#pragma once
#include "vectors.h"
#include "constants.h"
#include "turned.h"
#include "operands.h"

constexpr int ROWS = W == 16 ? 12 : 6, TALL = W == 16 ? 8 : 6;
// Rows that are summed into what stays in the second cache, and how many columns of them the first one holds.
constexpr int64_t BLOCK = 24, STRIP = 256;
// From one row of such a copy to the next: rows a power of two bytes apart fall on few sets of a cache.
constexpr int64_t COPY = STRIP + W;
// The same where sums have the shape of such a strip: each is read and written once for every block, a higher one.
constexpr int64_t DEEP = 2 * BLOCK, NARROW = STRIP / 2, NARROW_COPY = NARROW + W;

// One adapter: its factor, its columns among the padded ones of all, its dropout (seed null: none), its result.
struct Group {
    Factor factor;
    int64_t first;
    const int64_t* seed;
    int32_t least;  // of the hash, as a signed number, from which on an element is kept
    float keep;  // 1 / (1 - p)
    const double* scale;
    int64_t scales;  // one for all ranks, or one each
    void* part;
    float scale_of(int64_t r) const { return static_cast<float>(scale[std::min(r, scales - 1)]); }
};
typedef std::vector<Group> Groups;

// Where each group begins when each takes a multiple of columns; returns how many there are.
static int64_t place(Groups& groups, int64_t multiple) {
    int64_t columns = 0;
    for (Group& g : groups) {
        g.first = columns;
        columns += padded(g.factor.rank, multiple);
    }
    return columns;
}

// ``run`` with a factor's numbers in their dtype.
template <typename F> static inline void with_numbers(const Factor& f, const F& run) {
    if (f.is_bf16) run(static_cast<const bf16*>(f.data));
    else run(static_cast<const float*>(f.data));
}
// to[i * columns + r] = f(r, first + i) for i below ``count``, zero from its rank on to a multiple of ``multiple``.
static void pack_columns(const Factor& f, int64_t first, int64_t count, float* to, int64_t columns, int64_t multiple) {
    for (int64_t i = 0; i < count; ++i) std::fill_n(to + i * columns + f.rank, padded(f.rank, multiple) - f.rank, 0.0f);
    with_numbers(f, [&](const auto* from) {
        from += first * f.across;
        if (f.along == 1) {
            for (int64_t i = 0; i < count; ++i) load_row(from + i * f.across, to + i * columns, f.rank);
        } else if (f.across == 1) {
            turn(from, f.along, f.rank, count, to, columns);
        } else {
            for (int64_t i = 0; i < count; ++i)
                for (int64_t r = 0; r < f.rank; ++r) to[i * columns + r] = load(from + i * f.across + r * f.along);
        }
    });
}
// The same of all, each to its columns, for the share of a thread of those that there are on the other side.
static void pack_share(const Groups& groups, int64_t others, float* to, int64_t columns, int64_t multiple, int part,
                       int parts) {
    const int64_t begin = share_of(others, W, part, parts), end = share_of(others, W, part + 1, parts);
    for (const Group& g : groups)
        pack_columns(g.factor, begin, end - begin, to + begin * columns + g.first, columns, multiple);
}
// to[r * width + i] = f(r, first + i) for i below ``count``
static void pack_rows(const Factor& f, int64_t first, int64_t count, float* to, int64_t width) {
    with_numbers(f, [&](const auto* from) {
        from += first * f.across;
        if (f.across == 1) {
            for (int64_t r = 0; r < f.rank; ++r) load_row(from + r * f.along, to + r * width, count);
        } else if (f.along == 1) {
            turn(from, f.across, count, f.rank, to, width);
        } else {
            for (int64_t r = 0; r < f.rank; ++r)
                for (int64_t i = 0; i < count; ++i) to[r * width + i] = load(from + i * f.across + r * f.along);
        }
    });
}

constexpr uint32_t STEP = HASH_COLUMN;  // from one column to the next
struct Row { uint32_t first, second; };
static inline Row row_keys(const Group& g, int64_t row) {
    const uint64_t seed = static_cast<uint64_t>(*g.seed);
    const uint32_t high = static_cast<uint32_t>(seed >> 32), low = static_cast<uint32_t>(seed);
    const uint32_t r = static_cast<uint32_t>(row);
    return {r * HASH_ROW + (low + high * HASH_JOIN), r * HASH_OTHER_ROW + high};
}
// What the hashes of W columns from one on begin with.
static inline words begun(Row k, int64_t column) {
    words h;
    for (int l = 0; l < W; ++l) h[l] = l * STEP;
    return h + (static_cast<uint32_t>(column) * STEP + k.first);
}
// v * keep where an element is kept, else 0.
static inline vec kept(vec v, words h, uint32_t second, int32_t least, float keep) {
    h = ((h ^ (h >> 16)) * HASH_FIRST) ^ second;
    h = (h ^ (h >> 15)) * HASH_SECOND;
    return (ints)h >= least ? v * splat(keep) : vec{};
}

// Ask for what is read soon, in pieces of rows that are too short for the machine to see it by itself.
template <typename T> static inline void ask_for(const T* from, int64_t count) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t j = 0; j < count; j += line) __builtin_prefetch(from + j);
}
template <typename T>
static void copy_row(const T* from, float* to, int64_t row, int64_t first, int64_t count, const Group* g) {
    if (g == nullptr) return load_row(from, to, count);
    const Row keys = row_keys(*g, row);
    const int32_t least = g->least;
    const float keep = g->keep;
    words h = begun(keys, first);
    int64_t j = 0;
    for (; j + W <= count; j += W, h += W * STEP) write(to + j, kept(widened(from + j), h, keys.second, least, keep));
    if (j < count) {
        float part[W] = {};
        load_row(from + j, part, count - j);
        write(part, kept(read(part), h, keys.second, least, keep));
        std::copy(part, part + (count - j), to + j);
    }
}

// sum[N, V*W] += left[N, depth] right[depth, V*W], left's elements at (i * left_row + k * left_step)
template <int N, int V>
static inline void add_product(vec (&sum)[N][V], const float* left, int64_t left_row, int64_t left_step,
                               const float* right, int64_t right_row, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
        vec b[V];
        UNROLLED_FOR (int v = 0; v < V; ++v) b[v] = read(right + k * right_row + v * W);
        UNROLLED_FOR (int i = 0; i < N; ++i) {
            const vec a = splat(left[i * left_row + k * left_step]);
            UNROLLED_FOR (int v = 0; v < V; ++v) sum[i][v] += a * b[v];
        }
    }
}
template <int N, int V>
static inline void tile(const float* left, int64_t left_row, int64_t left_step, const float* right, int64_t right_row,
                        float* out, int64_t out_row, int64_t depth) {
    vec sum[N][V];
    UNROLLED_FOR (int i = 0; i < N; ++i)
        UNROLLED_FOR (int v = 0; v < V; ++v) sum[i][v] = read(out + i * out_row + v * W);
    add_product(sum, left, left_row, left_step, right, right_row, depth);
    UNROLLED_FOR (int i = 0; i < N; ++i)
        UNROLLED_FOR (int v = 0; v < V; ++v) write(out + i * out_row + v * W, sum[i][v]);
}
// out[N, V*W] += D . (left right), for the elements of the mask from (row, column) on
template <int N, int V>
static inline void dropped_tile(const float* left, int64_t left_row, const float* right, int64_t right_row, float* out,
                                int64_t out_row, const Group& g, int64_t row, int64_t column) {
    vec sum[N][V] = {};
    add_product(sum, left, left_row, 1, right, right_row, g.factor.rank);
    // With 16 registers the hashes of several rows at once are too many.
    #pragma GCC unroll(W == 16 ? 32 : 1)
    for (int i = 0; i < N; ++i) {
        const Row keys = row_keys(g, row + i);
        words h = begun(keys, column);
        UNROLLED_FOR (int v = 0; v < V; ++v, h += W * STEP) {
            float* to = out + i * out_row + v * W;
            write(to, read(to) + kept(sum[i][v], h, keys.second, g.least, g.keep));
        }
    }
}

// out[rows, V*W] += left[rows, depth] right
template <int N, int V>
static void tiles(const float* left, int64_t left_row, int64_t left_step, const float* right, int64_t right_row,
                  float* out, int64_t out_row, int64_t depth, int64_t rows) {
    int64_t i = 0;
    for (; i + N <= rows; i += N)
        tile<N, V>(left + i * left_row, left_row, left_step, right, right_row, out + i * out_row, out_row, depth);
    for (; i < rows; ++i)
        tile<1, V>(left + i * left_row, left_row, left_step, right, right_row, out + i * out_row, out_row, depth);
}
// The same for any multiple of W columns.
static void multiply(const float* left, int64_t left_row, int64_t left_step, const float* right, int64_t right_row,
                     float* out, int64_t out_row, int64_t depth, int64_t rows, int64_t columns) {
    int64_t c = 0;
    for (; c + 2 * W <= columns; c += 2 * W)
        tiles<ROWS, 2>(left, left_row, left_step, right + c, right_row, out + c, out_row, depth, rows);
    if (c < columns) tiles<ROWS, 1>(left, left_row, left_step, right + c, right_row, out + c, out_row, depth, rows);
}

// Sums of so many numbers at most, and their sums: they round less than one long sum.
constexpr int64_t LONGEST = 4 * BLOCK;
static_assert(LONGEST % BLOCK == 0 && LONGEST % DEEP == 0, "sums end with a block");
static_assert(STRIP % (2 * W) == 0 && NARROW % (2 * W) == 0, "strips are of whole pairs of vectors");
static bool ends_a_sum(int64_t count, int64_t last) { return count == last || count % LONGEST == 0; }
static void add(float* sums, float* totals, int64_t count) {  // of a multiple of W
    for (int64_t i = 0; i < count; i += W) {
        write(totals + i, read(totals + i) + read(sums + i));
        write(sums + i, vec{});
    }
}

// ``n`` rows of what was shrunk, (n, columns), to the parts.
template <typename T>
static void put_rows(const float* h, int64_t columns, int64_t from, int64_t n, const Groups& all) {
    for (const Group& g : all) {
        const int64_t rank = g.factor.rank;
        T* part = static_cast<T*>(g.part) + from * rank;
        for (int64_t c = 0; c < rank; ++c) {
            const float scale = g.scale_of(c);
            for (int64_t i = 0; i < n; ++i) store(part + i * rank + c, h[i * columns + g.first + c] * scale);
        }
    }
}

// Factors (width on the other side); parts (rows, rank).
template <typename T>
static void shrink(const T* x, int64_t rows, int64_t width, int64_t ldx, Groups& groups, int threads) {
    const bool dropped = groups[0].seed != nullptr;
    // Rows are read in place where few of them fall on one set of the first cache.
    const bool direct = sizeof(T) == 4 && !dropped && ldx % 512 != 0;
    const int64_t blocks = (rows + ROWS - 1) / ROWS, columns = place(groups, W);
    float* a = scratch<0>(width * columns);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) pack_share(groups, width, a, columns, W, part, threads);
        float *copy = scratch<1>(ROWS * COPY), *sums = scratch<2>(ROWS * columns), *h = scratch<3>(ROWS * columns);
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t i0 = b * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            std::fill_n(h, ROWS * columns, 0.0f);
            std::fill_n(sums, ROWS * columns, 0.0f);
            for (int64_t k0 = 0; k0 < width; k0 += STRIP) {
                const int64_t depth = std::min(STRIP, width - k0);
                for (const Group& g : groups) {
                    const T* from = x + i0 * ldx + k0;
                    for (int64_t i = 0; i < n && !direct; ++i)
                        copy_row(from + i * ldx, copy + i * COPY, i0 + i, k0, depth, dropped ? &g : nullptr);
                    const float* left = direct ? reinterpret_cast<const float*>(from) : copy;
                    multiply(left, direct ? ldx : COPY, 1, a + k0 * columns + g.first, columns, sums + g.first, columns,
                             depth, n, dropped ? padded(g.factor.rank, W) : columns);
                    if (!dropped) break;  // one copy, and all groups' columns at once
                }
                add(sums, h, n * columns);
            }
            put_rows<T>(h, columns, i0, n, groups);
        }
    }
}

// sums[N, 2*W] += h^T copy, of ``n`` rows
template <int N>
static void outer_tile(const float* h, int64_t columns, const float* copy, float* sums, int64_t n) {
    tile<N, 2>(h, 1, columns, copy, NARROW_COPY, sums, NARROW, n);
}
// The sums of a group, (rank, NARROW), over ``n`` more rows of ``cols`` columns of its copy of x.
static void add_outer(const float* h, int64_t columns, const float* copy, float* sums, int64_t n, int64_t cols,
                      const Group& g) {
    const int64_t end = g.first + padded(g.factor.rank, 4);
    // Tiles of 4 take what the tall ones leave, and where that is two ranks those of a tall one too.
    const int64_t rest = (end - g.first) % TALL, fours = rest % 4 == 0 ? rest : rest + TALL;
    for (int64_t c = 0; c < cols; c += 2 * W) {
        int64_t r = g.first;
        for (; r < end - fours; r += TALL) outer_tile<TALL>(h + r, columns, copy + c, sums + r * NARROW + c, n);
        for (; r < end; r += 4) outer_tile<4>(h + r, columns, copy + c, sums + r * NARROW + c, n);
    }
}

// Factors (rows on the other side); parts (rank, width), in fp32.
template <typename T>
static void gradient(const T* x, int64_t rows, int64_t width, int64_t ldx, Groups& groups, int threads) {
    const bool dropped = groups[0].seed != nullptr;
    const int64_t columns = place(groups, 4);
    float* h = scratch<0>(rows * columns);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) pack_share(groups, rows, h, columns, 4, part, threads);
        float *copy = scratch<1>(DEEP * NARROW_COPY), *sums = scratch<2>(columns * NARROW);
        float* totals = scratch<3>(columns * NARROW);
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            const int64_t last = share_of(width, 2 * W, part + 1, threads);
            for (int64_t c0 = share_of(width, 2 * W, part, threads); c0 < last; c0 += NARROW) {
                const int64_t cols = std::min<int64_t>(NARROW, last - c0);
                std::fill_n(sums, columns * NARROW, 0.0f);
                std::fill_n(totals, columns * NARROW, 0.0f);
                for (int64_t i0 = 0; i0 < rows; i0 += DEEP) {
                    const int64_t n = std::min<int64_t>(DEEP, rows - i0);
                    for (const Group& g : groups) {
                        if (dropped || &g == &groups[0])
                            for (int64_t i = 0; i < n; ++i) {
                                const T* from = x + (i0 + i) * ldx + c0;
                                copy_row(from, copy + i * NARROW_COPY, i0 + i, c0, cols, dropped ? &g : nullptr);
                                if (&g == &groups[0] && i0 + DEEP + i < rows) ask_for(from + DEEP * ldx, cols);
                            }
                        add_outer(h + i0 * columns, columns, copy, sums, n, cols, g);
                    }
                    if (ends_a_sum(i0 + n, rows)) add(sums, totals, columns * NARROW);
                }
                for (const Group& g : groups) {
                    float* to = static_cast<float*>(g.part) + c0;
                    for (int64_t r = 0; r < g.factor.rank; ++r)
                        std::copy_n(totals + (g.first + r) * NARROW, cols, to + r * width);
                }
            }
        }
    }
}

// A factor (width on the other side), its part (rows, rank); ``h``: (rows on the other side), dB (width, rank), fp32;
// ``sums``: room for two times (width, columns) for each thread.
// Threads share the rows, and what each sums is added up in their order: the same numbers in every run.
template <typename T>
static void both(const T* g, int64_t rows, int64_t width, int64_t ldg, Groups& groups, const Factor& h, float* dB,
                 float* sums, int threads) {
    const int64_t rank = h.rank, columns = place(groups, W);
    float* a = scratch<0>(width * columns);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) pack_share(groups, width, a, columns, W, part, threads);
        float *left = scratch<2>(BLOCK * columns), *q = scratch<3>(BLOCK * columns);
        float *copy = scratch<4>(BLOCK * COPY), *part_of_q = scratch<5>(BLOCK * columns);
        std::fill_n(part_of_q, BLOCK * columns, 0.0f);
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            float *totals = sums + part * width * columns, *own = totals + threads * width * columns;
            std::fill_n(own, width * columns, 0.0f);
            std::fill_n(totals, width * columns, 0.0f);
            const int64_t first = share_of(rows, ROWS, part, threads), last = share_of(rows, ROWS, part + 1, threads);
            for (int64_t i0 = first; i0 < last; i0 += BLOCK) {
                const int64_t n = std::min(BLOCK, last - i0);
                std::fill_n(q, n * columns, 0.0f);
                pack_columns(h, i0, n, left, columns, W);
                for (int64_t j = 0; j < width; j += STRIP) {
                    const int64_t cols = std::min(STRIP, width - j);
                    for (int64_t i = 0; i < n; ++i) load_row(g + (i0 + i) * ldg + j, copy + i * COPY, cols);
                    multiply(copy, COPY, 1, a + j * columns, columns, part_of_q, columns, cols, n, columns);
                    add(part_of_q, q, n * columns);
                    multiply(copy, 1, COPY, left, columns, own + j * columns, columns, n, cols, columns);
                }
                put_rows<T>(q, columns, i0, n, groups);
                if (ends_a_sum(i0 + n - first, last - first)) add(own, totals, width * columns);
            }
        }
        #pragma omp for schedule(static)
        for (int64_t j = 0; j < width; ++j)
            for (int64_t c = 0; c < rank; ++c) {
                float total = sums[j * columns + c];
                for (int t = 1; t < threads; ++t) total += sums[(t * width + j) * columns + c];
                dB[j * rank + c] = total;
            }
    }
}

// out[rows, V*W] += D . (left right) of one group, whose ranks are among those of all in ``left`` and ``right``.
template <int N, int V>
static void dropped_tiles(const float* left, int64_t left_row, const float* right, int64_t right_row, float* out,
                          int64_t out_row, const Group& g, int64_t row, int64_t rows, int64_t column) {
    left += g.first, right += g.first * right_row;
    if (rows == N) return dropped_tile<N, V>(left, left_row, right, right_row, out, out_row, g, row, column);
    for (int64_t i = 0; i < rows; ++i)
        dropped_tile<1, V>(left + i * left_row, left_row, right, right_row, out + i * out_row, out_row, g, row + i,
                           column);
}

// Factors (width on the other side), those of ``q`` (rows on the other side).
template <typename T>
static void update(T* total, int64_t rows, int64_t width, Groups& groups, const std::vector<Factor>& q, int threads) {
    // A block of rows of a power of two bytes falls on one set of a cache: no more rows than it has ways for.
    constexpr int N = 6, V = W == 16 ? 4 : 2;
    constexpr int64_t PANEL = V * W;
    const bool dropped = groups[0].seed != nullptr;
    // Of whole panels, one after another: rows of a power of two bytes fall on few sets of a cache.
    const int64_t blocks = (rows + N - 1) / N, panels = (width + PANEL - 1) / PANEL, ranks = place(groups, 1);
    float* a = scratch<0>(ranks * panels * PANEL);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p)
            for (const Group& g : groups)
                pack_rows(g.factor, p * PANEL, std::min<int64_t>(PANEL, width - p * PANEL),
                          a + (p * ranks + g.first) * PANEL, PANEL);
        float* left = scratch<1>(N * ranks);
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t i0 = b * N, n = std::min<int64_t>(N, rows - i0);
            alignas(64) float sums[N * PANEL];
            for (size_t g = 0; g < q.size(); ++g) pack_columns(q[g], i0, n, left + groups[g].first, ranks, 1);
            for (int64_t p = 0; p < panels; ++p) {
                const int64_t c0 = p * PANEL, cols = std::min<int64_t>(PANEL, width - c0);
                const bool direct = sizeof(T) == 4 && cols == PANEL;
                float* to = direct ? reinterpret_cast<float*>(total + i0 * width + c0) : sums;
                const int64_t ld = direct ? width : PANEL;
                for (int64_t i = 0; i < n && !direct; ++i)
                    load_row(total + (i0 + i) * width + c0, sums + i * PANEL, cols);
                const float* panel = a + p * ranks * PANEL;
                if (!dropped) tiles<N, V>(left, ranks, 1, panel, PANEL, to, ld, ranks, n);
                for (size_t g = 0; dropped && g < groups.size(); ++g)
                    dropped_tiles<N, V>(left, ranks, panel, PANEL, to, ld, groups[g], i0, n, c0);
                for (int64_t i = 0; i < n && !direct; ++i)
                    store_row(sums + i * PANEL, total + (i0 + i) * width + c0, cols);
            }
        }
    }
}
