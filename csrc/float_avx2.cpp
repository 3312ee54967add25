// Unquantised weights with AVX2, FMA and F16C.
#include "cpu.h"
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx2,fma,f16c")

namespace moert {
namespace {

struct Vec {
    using Reg = __m256;
    static constexpr int64_t kLanes = 8;
    static constexpr int kMostTokens = 3;

    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Reg value) { _mm256_storeu_ps(to, value); }
    static Reg broadcast(float value) { return _mm256_set1_ps(value); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
    static float sum(Reg value) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    }

    template <Format kFormat>
    static Reg weights(const uint8_t* from) {
        if (kFormat == Format::kFp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
        return widen<kFormat>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    template <Format kFormat>
    static Reg weights_tail(const uint8_t* from, int n) {
        alignas(32) uint8_t there[32] = {};
        __builtin_memcpy(there, from, static_cast<size_t>(n) * (kFormat == Format::kFp32 ? 4 : 2));
        return weights<kFormat>(there);
    }

  private:
    template <Format kFormat>
    static Reg widen(__m128i bits) {
        if (kFormat == Format::kFp16) return _mm256_cvtph_ps(bits);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
};

#include "float_rows.inl"

MOERT_FLOAT_KERNELS("avx2");

}  // namespace

const Kernel* float_avx2(const Matrix& w, int64_t) {
    return select_float(w, kKernels);
}

}  // namespace moert

MOERT_END_TARGET
#endif
