// The products of bf16 with one small side. Without the instructions ``lanes`` is 0 and nothing else is there.
#if !(defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__))
extern "C" int lanes() { return 0; }
#else
#include "pairs_ops.h"

extern "C" int lanes() { return W; }
#endif
