#include "half.h"
#include "pointwise.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")

namespace moert {
namespace {

void widen_fp16(const uint8_t* from, float* to, int64_t n) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i))));
    for (; i < n; ++i) to[i] = fp16_to_float(halves[i]);
}

void narrow_fp16(const float* from, uint8_t* to, int64_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
    for (; i < n; ++i) halves[i] = float_to_fp16(from[i]);
}

#include "pointwise.inl"

#include "norm.inl"

#include "rotary.inl"

inline float multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}

constexpr int64_t kHeadsTogether = 4;

#include "attention.inl"

}  // namespace

const Pointwise kPointwiseAvx512 = {widen, narrow,    round_numbers, gate_numbers, add,  add_weighted,
                                    dot,   normalise, turn,          attend,       merge};

}  // namespace moert

MOERT_END_TARGET
#endif
