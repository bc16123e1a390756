// Rows of numbers, W at a time, in fp32. To be included first: what is before the pragma may not be inlined behind it.
#pragma once
#include "elements.h"

// A sum of products is one instruction and rounds once.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(W * 4)));
typedef int32_t ints __attribute__((vector_size(W * 4)));

static inline vec read(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void write(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
typedef uint16_t halves __attribute__((vector_size(W * 2), aligned(2), may_alias));
static inline vec widened(const float* p) { return read(p); }
static inline vec widened(const bf16* p) {
#if defined(__AVX512F__)  // gcc makes two halves of it
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
    return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16);
#endif
}
static inline void narrow(float* p, vec v) { write(p, v); }
static inline void narrow(bf16* p, vec v) {  // as store
    const words word = (words)v, rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16, nan = (words)(v != v);
    *reinterpret_cast<halves*>(p) = __builtin_convertvector((nan & 0x7FC0u) | (~nan & rounded), halves);
}
template <typename T> static inline void load_row(const T* from, float* to, int64_t count) {
    int64_t j = 0;
    for (; j + W <= count; j += W) write(to + j, widened(from + j));
    for (; j < count; ++j) to[j] = load(from + j);
}
template <typename T> static inline void store_row(const float* from, T* to, int64_t count) {
    int64_t j = 0;
    for (; j + W <= count; j += W) narrow(to + j, read(from + j));
    for (; j < count; ++j) store(to + j, from[j]);
}
static inline vec splat(float v) { return v - vec{}; }  // v + 0 is not v where v is -0: an instruction more
