// LoRA where each row has an adapter of its own, or none: the kernels; lora_rows.py says what they compute. What is
// summed for a row, and in which order, depends on its adapter and on how many rows that one has: not on the threads.
#pragma once
#include "skinny.h"
#include <unordered_map>

// Rows of an adapter up to which its factors are read where they are: to copy them costs as much as the products.
constexpr int64_t FEW = 4;
// Numbers that a sum of a shrunk row has at most before it is added to others: long sums round more.
constexpr int64_t LENGTH = 128;
// Rows that share one copy of the factors.
constexpr int64_t MOST_ROWS = 256;
// What a copy costs, in rows.
constexpr int64_t COPY_IN_ROWS = 12;
// Register tiles of what is expanded, and how many columns of a factor are copied at once.
constexpr int TILE_ROWS = 6, TILE_VECTORS = W == 16 ? 4 : 2;
constexpr int64_t PANEL = TILE_VECTORS * W, SHEET = 4 * PANEL;
// Numbers that eight sums read before others do.
constexpr int64_t DOTS = 512;

struct Adapter {
    Factor A, B;
    const double* scale;
    int64_t scales;
    float scale_of(int64_t r) const { return static_cast<float>(scale[std::min(r, scales - 1)]); }
    int64_t rank() const { return A.rank; }
    int64_t columns() const { return padded(A.rank, W); }
};
typedef std::vector<Adapter> Adapters;

// Rows at one distance from each other.
template <typename T> struct Table {
    T* data;
    int64_t distance;
    T* row(int64_t i) const { return data + i * distance; }
};

// The rows of each adapter, in their order.
struct Grouped {
    std::vector<int64_t> rows, others;  // one adapter's behind the other's; those that have none
    std::vector<int64_t> first;  // of each adapter among ``rows``, and where the last one ends
    int64_t count(size_t place) const { return first[place + 1] - first[place]; }
};
static Grouped grouped(const int64_t* ids, int64_t count, const std::vector<int64_t>& numbers) {
    std::unordered_map<int64_t, int64_t> places;
    for (size_t i = 0; i < numbers.size(); ++i) places[numbers[i]] = static_cast<int64_t>(i);
    std::vector<int64_t> place(count);
    Grouped found;
    found.first.assign(numbers.size() + 1, 0);
    for (int64_t m = 0; m < count; ++m) {
        if (m > 0 && ids[m] == ids[m - 1]) {
            place[m] = place[m - 1];
        } else {
            const auto at = places.find(ids[m]);
            place[m] = at == places.end() ? -1 : at->second;
        }
        if (place[m] >= 0) ++found.first[place[m] + 1];
        else found.others.push_back(m);
    }
    for (size_t i = 0; i < numbers.size(); ++i) found.first[i + 1] += found.first[i];
    std::vector<int64_t> next(found.first);
    found.rows.resize(count - found.others.size());
    for (int64_t m = 0; m < count; ++m)
        if (place[m] >= 0) found.rows[next[place[m]]++] = m;
    return found;
}
// ``run`` (place, first, last) with a thread's share of the rows, as places among ``grouped.rows``.
template <typename F>
static void each_share(const Grouped& rows, const Adapters& adapters, int part, int parts, const F& run) {
    const auto weight = [&](size_t a) {
        return rows.count(a) ? adapters[a].rank() * (rows.count(a) + COPY_IN_ROWS) : 0;
    };
    int64_t total = 0, before = 0;
    for (size_t a = 0; a < adapters.size(); ++a) total += weight(a);
    const int64_t low = total * part / parts, high = total * (part + 1) / parts;
    for (size_t a = 0; a < adapters.size(); before += weight(a), ++a) {
        const int64_t count = rows.count(a), own = weight(a);
        // The row at which ``weight`` is reached, among those where a register tile ends.
        const auto cut = [&](int64_t reached) -> int64_t {
            if (reached <= before) return 0;
            if (reached >= before + own) return count;
            return std::min(count, (2 * (reached - before) * count / own + ROWS) / (2 * ROWS) * ROWS);
        };
        const int64_t end = part + 1 == parts ? count : cut(high);
        for (int64_t i = cut(low); i < end; i += MOST_ROWS)
            run(a, rows.first[a] + i, rows.first[a] + std::min(i + MOST_ROWS, end));
    }
}

// out[n, V*W] += left[n, depth] right[depth, V*W], of n rows up to N
template <int N, int V>
static inline void add_tile(int64_t n, const float* left, int64_t left_row, const float* right, int64_t right_row,
                            float* out, int64_t out_row, int64_t depth) {
    if constexpr (N > 1)
        if (n < N) return add_tile<N - 1, V>(n, left, left_row, right, right_row, out, out_row, depth);
    vec sum[N][V] = {};
    add_product(sum, left, left_row, 1, right, right_row, depth);
    UNROLLED_FOR (int i = 0; i < N; ++i)
        UNROLLED_FOR (int v = 0; v < V; ++v) {
            float* to = out + i * out_row + v * W;
            write(to, read(to) + sum[i][v]);
        }
}
// sums[i * columns + r] = x_i . f_r of the ``m`` rows of x that ``rows`` names
template <typename T>
static void shrink_rows(const Table<const T>& x, const int64_t* rows, int64_t m, int64_t width, const Factor& f,
                        float* sums, int64_t columns) {
    constexpr int64_t distance = LENGTH + W;  // rows a power of two bytes apart fall on few sets of a cache
    float *strip = scratch<6>(LENGTH * columns), *copy = scratch<7>(ROWS * distance);
    std::fill_n(sums, m * columns, 0.0f);
    for (int64_t k0 = 0; k0 < width; k0 += LENGTH) {
        const int64_t depth = std::min(LENGTH, width - k0);
        pack_columns(f, k0, depth, strip, columns, W);
        for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
            const int64_t n = std::min<int64_t>(ROWS, m - i0);
            const float* left = copy;
            int64_t left_row = distance;
            if constexpr (sizeof(T) == 4)  // a copy that is read once is not worth it
                if (columns <= 2 * W && rows[i0 + n - 1] - rows[i0] == n - 1)
                    left = x.row(rows[i0]) + k0, left_row = x.distance;
            for (int64_t i = 0; i < n && left == copy; ++i)
                load_row(x.row(rows[i0 + i]) + k0, copy + i * distance, depth);
            float* to = sums + i0 * columns;
            int64_t c = 0;
            for (; c + 2 * W <= columns; c += 2 * W)
                add_tile<ROWS, 2>(n, left, left_row, strip + c, columns, to + c, columns, depth);
            if (c < columns) add_tile<ROWS, 1>(n, left, left_row, strip + c, columns, to + c, columns, depth);
        }
    }
}
// to_i = left_i right, and from_i where there is one, of n rows up to N and the columns of a tile from c on
template <int N>
static inline void put_tile(int64_t n, const float* left, int64_t left_row, const float* right, int64_t depth,
                            const float* const* from, float* const* to, int64_t c) {
    if constexpr (N > 1)
        if (n < N) return put_tile<N - 1>(n, left, left_row, right, depth, from, to, c);
    vec sum[N][TILE_VECTORS] = {};
    add_product(sum, left, left_row, 1, right, SHEET, depth);
    UNROLLED_FOR (int i = 0; i < N; ++i)
        UNROLLED_FOR (int v = 0; v < TILE_VECTORS; ++v) {
            const int64_t at = c + v * W;
            write(to[i] + at, from[i] == nullptr ? sum[i][v] : read(from[i] + at) + sum[i][v]);
        }
}
// to_i = from_i + left_i f of the ``m`` rows of both that ``rows`` names; nothing is added where ``from`` has no data
template <typename T>
static void expand_rows(const float* left, int64_t columns, const Factor& f, const int64_t* rows, int64_t m,
                        int64_t width, const Table<const T>& from, const Table<T>& to) {
    float* sheet = scratch<8>(f.rank * SHEET);
    alignas(64) float buffer[TILE_ROWS * PANEL];
    for (int64_t c0 = 0; c0 < width; c0 += SHEET) {
        const int64_t cols = std::min(SHEET, width - c0), whole = padded(cols, PANEL);
        pack_rows(f, c0, cols, sheet, SHEET);
        for (int64_t r = 0; r < f.rank && cols < whole; ++r) std::fill_n(sheet + r * SHEET + cols, whole - cols, 0.0f);
        for (int64_t i0 = 0; i0 < m; i0 += TILE_ROWS) {
            const int64_t n = std::min<int64_t>(TILE_ROWS, m - i0);
            const T* in[TILE_ROWS] = {};
            T* out[TILE_ROWS] = {};
            for (int64_t i = 0; i < n; ++i) {
                out[i] = to.row(rows[i0 + i]) + c0;
                if (from.data == nullptr) continue;
                in[i] = from.row(rows[i0 + i]) + c0;
                if (i0 + i + TILE_ROWS < m) ask_for(from.row(rows[i0 + i + TILE_ROWS]) + c0, cols);
            }
            const float* own = left + i0 * columns;
            for (int64_t c = 0; c < cols; c += PANEL) {
                if constexpr (sizeof(T) == 4)
                    if (c + PANEL <= cols) {
                        put_tile<TILE_ROWS>(n, own, columns, sheet + c, f.rank, in, out, c);
                        continue;
                    }
                const int64_t some = std::min(PANEL, cols - c);
                const float* given[TILE_ROWS] = {};
                float* made[TILE_ROWS] = {};
                for (int64_t i = 0; i < n; ++i) {
                    made[i] = buffer + i * PANEL;
                    if (in[i] == nullptr) continue;
                    load_row(in[i] + c, made[i], some);
                    given[i] = made[i];
                }
                put_tile<TILE_ROWS>(n, own, columns, sheet + c, f.rank, given, made, 0);
                for (int64_t i = 0; i < n; ++i) store_row(made[i], out[i] + c, some);
            }
        }
    }
}

// The same as shrink_rows of few rows ``x`` (m, width), whose factor's numbers lie behind each other for each rank.
template <typename N>
static void shrink_few(const float* const* x, int64_t m, int64_t width, const N* from, int64_t along, int64_t rank,
                       float* sums, int64_t columns) {
    std::fill_n(sums, m * columns, 0.0f);
    for (int64_t r = 0; r < rank; r += 8) {
        const N* f[8];
        for (int j = 0; j < 8; ++j) f[j] = from + std::min(r + j, rank - 1) * along;
        for (int64_t k0 = 0; k0 < width; k0 += DOTS) {
            const int64_t end = std::min(k0 + DOTS, width);
            for (int64_t i = 0; i < m; ++i) {
                vec8 dots[8] = {};
                int64_t k = k0;
                for (; k + 8 <= end; k += 8) {
                    const vec8 one = eight(x[i] + k);
                    UNROLLED_FOR (int j = 0; j < 8; ++j) dots[j] += one * eight(f[j] + k);
                }
                vec8 sum = sums_of(dots);
                for (; k < end; ++k)
                    for (int j = 0; j < 8; ++j) sum[j] += x[i][k] * load(f[j] + k);
                for (int64_t j = 0; j < std::min<int64_t>(8, rank - r); ++j) sums[i * columns + r + j] += sum[j];
            }
        }
    }
}
// The same as expand_rows of few rows, whose factor's ranks, a multiple of 8, lie behind each other for each column.
template <typename T, typename N>
static void expand_few(const float* left, int64_t columns, const N* f, int64_t across, int64_t rank,
                       const int64_t* rows, int64_t m, int64_t width, const Table<const T>& from, const Table<T>& to) {
    for (int64_t c = 0; c < width; c += 8) {
        const int64_t cols = std::min<int64_t>(8, width - c);
        const N* b[8];
        for (int64_t j = 0; j < 8; ++j) b[j] = f + (c + std::min(j, cols - 1)) * across;
        for (int64_t i = 0; i < m; ++i) {
            vec8 dots[8] = {};
            for (int64_t r = 0; r < rank; r += 8) {
                const vec8 one = eight(left + i * columns + r);
                UNROLLED_FOR (int j = 0; j < 8; ++j) dots[j] += one * eight(b[j] + r);
            }
            float y[8] = {};
            load_row(from.row(rows[i]) + c, y, cols);
            write8(y, eight(y) + sums_of(dots));
            store_row(y, to.row(rows[i]) + c, cols);
        }
    }
}

struct Sizes { int64_t rows, inputs, outputs, widest; };  // M, K, N and the largest rank

// ``left`` scaled and rounded as what is kept of it, which goes to ``h`` (m, rank) at ``widest`` where that is given.
template <typename T>
static void scale_rows(const Adapter& a, float* left, int64_t m, const int64_t* rows, T* h, int64_t widest) {
    const int64_t rank = a.rank(), columns = a.columns();
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t r = 0; r < rank; ++r) {
            T kept;
            store(&kept, left[i * columns + r] * a.scale_of(r));
            left[i * columns + r] = load(&kept);
            if (h != nullptr) h[rows[i] * widest + r] = kept;
        }
        if (h != nullptr) std::fill_n(h + rows[i] * widest + rank, widest - rank, T{});
    }
}
// ``m`` rows of one adapter; ``few``: as all of its rows are.
template <typename T>
static void forward_rows(const Adapter& a, bool few, const int64_t* rows, int64_t m, const Sizes& sizes,
                         const Table<const T>& x, const Table<const T>& y, const Table<T>& out, T* h) {
    const int64_t columns = a.columns();
    float* left = scratch<9>(m * columns);
    if (few && a.A.across == 1) {
        const float* wide[FEW] = {};
        float* copy = sizeof(T) == 4 ? nullptr : scratch<7>(m * sizes.inputs);
        for (int64_t i = 0; i < m; ++i) {
            if constexpr (sizeof(T) == 4) {
                wide[i] = x.row(rows[i]);
            } else {
                load_row(x.row(rows[i]), copy + i * sizes.inputs, sizes.inputs);
                wide[i] = copy + i * sizes.inputs;
            }
        }
        with_numbers(a.A,
                     [&](const auto* f) { shrink_few(wide, m, sizes.inputs, f, a.A.along, a.rank(), left, columns); });
    } else {
        shrink_rows(x, rows, m, sizes.inputs, a.A, left, columns);
    }
    scale_rows(a, left, m, rows, h, sizes.widest);
    if (few && a.B.along == 1 && a.rank() % 8 == 0)
        with_numbers(a.B, [&](const auto* f) {
            expand_few(left, columns, f, a.B.across, a.rank(), rows, m, sizes.outputs, y, out);
        });
    else expand_rows(left, columns, a.B, rows, m, sizes.outputs, y, out);
}
// ``out`` (M, N) may be ``y``; ``h`` (M, widest).
template <typename T>
static void forward(const Grouped& grouped, const Adapters& adapters, const Sizes& sizes, const Table<const T>& x,
                    const Table<const T>& y, const Table<T>& out, T* h, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
        each_share(grouped, adapters, part, threads, [&](size_t a, int64_t first, int64_t last) {
            forward_rows(adapters[a], grouped.count(a) <= FEW, grouped.rows.data() + first, last - first, sizes, x, y,
                         out, h);
        });
        const int64_t others = grouped.others.size(), end = share_of(others, 1, part + 1, threads);
        for (int64_t i = share_of(others, 1, part, threads); i < end; ++i) {
            const int64_t m = grouped.others[i];
            if (out.data != y.data) std::copy_n(y.row(m), sizes.outputs, out.row(m));
            std::fill_n(h + m * sizes.widest, sizes.widest, T{});
        }
    }
}

// d (rank, cols) = left^T x of the columns of x from c0 on; ``left`` (m, columns). The sums are NARROW apart.
template <typename T>
static const float* outer_rows(const float* left, int64_t columns, int64_t rank, const Table<const T>& x,
                               const int64_t* rows, int64_t m, int64_t c0, int64_t cols) {
    float *copy = scratch<7>(DEEP * NARROW_COPY), *sums = scratch<6>(columns * NARROW);
    float* totals = scratch<8>(columns * NARROW);
    std::fill_n(sums, columns * NARROW, 0.0f);
    std::fill_n(totals, columns * NARROW, 0.0f);
    Group all{};
    all.factor.rank = rank;
    for (int64_t i0 = 0; i0 < m; i0 += DEEP) {
        const int64_t n = std::min<int64_t>(DEEP, m - i0);
        for (int64_t i = 0; i < n; ++i) {
            load_row(x.row(rows[i0 + i]) + c0, copy + i * NARROW_COPY, cols);
            if (i0 + i + DEEP < m) ask_for(x.row(rows[i0 + i + DEEP]) + c0, cols);
        }
        add_outer(left + i0 * columns, columns, copy, sums, n, cols, all);
        if (ends_a_sum(i0 + n, m)) add(sums, totals, columns * NARROW);
    }
    return totals;
}
// What the gradients are of and where they go: dx (none: not asked for) and, of each adapter, dA (rank, K) and
// dB (N, rank) in fp32 (null: not asked for).
template <typename T> struct Gradients {
    Table<const T> g, x, h;
    Table<T> dx;
    std::vector<float*> dA, dB;
};
template <typename T>
static void backward(const Grouped& grouped, const Adapters& adapters, const Sizes& sizes, const Gradients<T>& to,
                     int threads) {
    const int64_t count = adapters.size(), pitch = padded(sizes.widest, W);
    const int64_t strips_x = (sizes.inputs + NARROW - 1) / NARROW, strips_g = (sizes.outputs + NARROW - 1) / NARROW;
    float* const q = scratch<10>(2 * grouped.rows.size() * pitch);  // and h, in fp32
    float* const h = q + grouped.rows.size() * pitch;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            each_share(grouped, adapters, part, threads, [&](size_t place, int64_t first, int64_t last) {
                const Adapter& a = adapters[place];
                const int64_t* rows = grouped.rows.data() + first;
                const int64_t m = last - first, columns = a.columns();
                const int64_t at = grouped.first[place] * pitch + (first - grouped.first[place]) * columns;
                if (to.dB[place] != nullptr)
                    for (int64_t i = 0; i < m; ++i) {
                        load_row(to.h.row(rows[i]), h + at + i * columns, a.rank());
                        std::fill_n(h + at + i * columns + a.rank(), columns - a.rank(), 0.0f);
                    }
                if (to.dA[place] == nullptr && to.dx.data == nullptr) return;
                shrink_rows(to.g, rows, m, sizes.outputs, a.B, q + at, columns);
                scale_rows<T>(a, q + at, m, rows, nullptr, 0);
                if (to.dx.data != nullptr) expand_rows(q + at, columns, a.A, rows, m, sizes.inputs, {}, to.dx);
            });
            const int64_t others = grouped.others.size(), end = share_of(others, 1, part + 1, threads);
            for (int64_t i = share_of(others, 1, part, threads); i < end && to.dx.data != nullptr; ++i)
                std::fill_n(to.dx.row(grouped.others[i]), sizes.inputs, T{});
        }
        #pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < count * (strips_x + strips_g); ++item) {
            const int64_t place = item / (strips_x + strips_g), strip = item % (strips_x + strips_g);
            const bool of_A = strip < strips_x;
            float* const made = of_A ? to.dA[place] : to.dB[place];
            if (made == nullptr) continue;
            const int64_t width = of_A ? sizes.inputs : sizes.outputs, c0 = (of_A ? strip : strip - strips_x) * NARROW;
            const int64_t cols = std::min(NARROW, width - c0), rank = adapters[place].rank();
            const float* sums = outer_rows((of_A ? q : h) + grouped.first[place] * pitch, adapters[place].columns(),
                                           rank, of_A ? to.x : to.g, grouped.rows.data() + grouped.first[place],
                                           grouped.count(place), c0, cols);
            if (of_A)
                for (int64_t r = 0; r < rank; ++r) std::copy_n(sums + r * NARROW, cols, made + r * width + c0);
            else turn(sums, NARROW, rank, cols, made + c0 * rank, rank);
        }
    }
}
