// Seeded dropout in one pass over its input.
#include "constants.h"
#include "elements.h"

template <typename T>
static void drop(const T* x, T* y, int64_t rows, int64_t width, uint64_t seed, uint32_t least, float scale,
                 int threads) {
    const uint32_t high = static_cast<uint32_t>(seed >> 32);
    const uint32_t start = static_cast<uint32_t>(seed) + high * HASH_JOIN;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
        const uint32_t row = static_cast<uint32_t>(i);
        const uint32_t first = row * HASH_ROW + start, second = row * HASH_OTHER_ROW + high;
        const T* from = x + i * width;
        T* to = y + i * width;
        for (int64_t j = 0; j < width; ++j) {
            uint32_t h = static_cast<uint32_t>(j) * HASH_COLUMN + first;
            h = ((h ^ (h >> 16)) * HASH_FIRST) ^ second;
            h = (h ^ (h >> 15)) * HASH_SECOND;
            const float v = load(from + j) * scale;
            store(to + j, (h ^ 0x80000000u) >= least ? v : 0.0f);
        }
    }
}

extern "C" void drop_f32(const void* x, void* y, int64_t rows, int64_t width, const int64_t* seed, uint32_t least,
                         float scale, int threads) {
    drop(static_cast<const float*>(x), static_cast<float*>(y), rows, width, static_cast<uint64_t>(*seed), least, scale,
         threads);
}
extern "C" void drop_bf16(const void* x, void* y, int64_t rows, int64_t width, const int64_t* seed, uint32_t least,
                          float scale, int threads) {
    drop(static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, width, static_cast<uint64_t>(*seed), least, scale,
         threads);
}
