#include "half.h"
#include "pointwise.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx2,fma,f16c")

namespace moert {
namespace {

void widen_fp16(const uint8_t* from, float* to, int64_t n) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    for (; i < n; ++i) to[i] = fp16_to_float(halves[i]);
}

void narrow_fp16(const float* from, uint8_t* to, int64_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    for (; i < n; ++i) halves[i] = float_to_fp16(from[i]);
}

#include "pointwise.inl"

#include "norm.inl"

#include "rotary.inl"

inline float multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}

constexpr int64_t kHeadsTogether = 1;

#include "attention.inl"

}  // namespace

const Pointwise kPointwiseAvx2 = {widen, narrow,    round_numbers, gate_numbers, add,  add_weighted,
                                  dot,   normalise, turn,          attend,       merge};

}  // namespace moert

MOERT_END_TARGET
#endif
