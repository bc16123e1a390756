// ``load`` and ``store`` of float and bf16, and ``UNROLLED_FOR``.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Before a loop over an array that registers hold: gcc unrolls it before it looks for such arrays, and not only after.
#define UNROLLED_FOR _Pragma("GCC unroll 32") for

static inline float load(const float* p) { return *p; }
static inline void store(float* p, float v) { *p = v; }
struct bf16 { uint16_t bits; };
static inline float load(const bf16* p) {
    uint32_t word = static_cast<uint32_t>(p->bits) << 16;
    float v;
    std::memcpy(&v, &word, 4);
    return v;
}
static inline void store(bf16* p, float v) {  // to nearest, ties to even; NaN stays NaN
    uint32_t word;
    std::memcpy(&word, &v, 4);
    uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(v != v ? 0x7FC0u : rounded);
}
