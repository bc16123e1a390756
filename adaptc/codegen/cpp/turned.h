// Matrices that are copied with rows and columns exchanged, and sums of several vectors at once: by squares of 8.
#pragma once
#include "vectors.h"

typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
static inline vec8 eight(const float* p) { return *reinterpret_cast<const vec8*>(p); }
static inline void write8(float* p, vec8 v) { *reinterpret_cast<vec8*>(p) = v; }
static inline vec8 eight(const bf16* p) {
    typedef uint16_t halves8 __attribute__((vector_size(16), aligned(2), may_alias));
    typedef uint32_t words8 __attribute__((vector_size(32)));
    return (vec8)(__builtin_convertvector(*reinterpret_cast<const halves8*>(p), words8) << 16);
}

#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
static inline vec8 low(vec8 a, vec8 b) { return PICKED(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
static inline vec8 high(vec8 a, vec8 b) { return PICKED(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
static inline vec8 firsts(vec8 a, vec8 b) { return PICKED(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
static inline vec8 lasts(vec8 a, vec8 b) { return PICKED(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
static inline vec8 fronts(vec8 a, vec8 b) { return PICKED(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
static inline vec8 backs(vec8 a, vec8 b) { return PICKED(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
// to[j * to_row + i] = from[i * from_row + j] for i and j below 8
template <typename T>
static inline void turn_square(const T* from, int64_t from_row, float* to, int64_t to_row) {
    vec8 v[8], t[8];
    UNROLLED_FOR (int i = 0; i < 8; ++i) v[i] = eight(from + i * from_row);
    UNROLLED_FOR (int i = 0; i < 8; i += 2) t[i] = low(v[i], v[i + 1]), t[i + 1] = high(v[i], v[i + 1]);
    UNROLLED_FOR (int i = 0; i < 8; i += 4) {
        v[i] = firsts(t[i], t[i + 2]), v[i + 1] = lasts(t[i], t[i + 2]);
        v[i + 2] = firsts(t[i + 1], t[i + 3]), v[i + 3] = lasts(t[i + 1], t[i + 3]);
    }
    UNROLLED_FOR (int i = 0; i < 4; ++i) {
        write8(to + i * to_row, fronts(v[i], v[i + 4]));
        write8(to + (i + 4) * to_row, backs(v[i], v[i + 4]));
    }
}
// The sums of eight vectors.
static inline vec8 sums_of(const vec8 (&v)[8]) {
    vec8 t[4], u[2];
    UNROLLED_FOR (int i = 0; i < 4; ++i) t[i] = low(v[2 * i], v[2 * i + 1]) + high(v[2 * i], v[2 * i + 1]);
    UNROLLED_FOR (int i = 0; i < 2; ++i) u[i] = firsts(t[2 * i], t[2 * i + 1]) + lasts(t[2 * i], t[2 * i + 1]);
    return fronts(u[0], u[1]) + backs(u[0], u[1]);
}
#else
template <typename T>
static inline void turn_square(const T* from, int64_t from_row, float* to, int64_t to_row) {
    for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 8; ++i) to[j * to_row + i] = load(from + i * from_row + j);
}
static inline vec8 sums_of(const vec8 (&v)[8]) {
    vec8 sums{};
    for (int i = 0; i < 8; ++i)
        sums[i] = ((v[i][0] + v[i][2]) + (v[i][1] + v[i][3])) + ((v[i][4] + v[i][6]) + (v[i][5] + v[i][7]));
    return sums;
}
#endif

// to[j * to_row + i] = from[i * from_row + j] for i below ``rows`` and j below ``columns``
template <typename T>
static void turn(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += 8)
        for (int64_t j = 0; j < columns; j += 8) {
            if (i + 8 <= rows && j + 8 <= columns) {
                turn_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
                continue;
            }
            for (int64_t b = j; b < std::min(j + 8, columns); ++b)
                for (int64_t a = i; a < std::min(i + 8, rows); ++a) to[b * to_row + a] = load(from + a * from_row + b);
        }
}
