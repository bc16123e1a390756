"""What the kernels share: numbers of 16 bits, and how often a dropout keeps an element."""

from __future__ import annotations

import math

#: C++: ``load`` and ``store`` of float and bf16.
ELEMENTS = r"""
#include <cstdint>
#include <cstring>

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
"""


def threshold(p: float) -> int:
    """The 32-bit word from which on a hash keeps its element."""
    return min(math.floor(p * 2**32), 2**32 - 1)


def kept_scale(p: float) -> float:
    """What a kept element is multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0
