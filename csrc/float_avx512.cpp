// Unquantised weights with AVX-512.
#include "cpu.h"
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace moert {
namespace {

struct Vec {
    using Reg = __m512;
    static constexpr int64_t kLanes = 16;
    static constexpr int kMostTokens = 6;

    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Reg value) { _mm512_storeu_ps(to, value); }
    static Reg broadcast(float value) { return _mm512_set1_ps(value); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Reg value) { return _mm512_reduce_add_ps(value); }
    static void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

    template <Format kFormat>
    static Reg weights(const uint8_t* from) {
        if (kFormat == Format::kFp32) return _mm512_loadu_ps(from);
        return widen<kFormat>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    template <Format kFormat>
    static Reg weights_tail(const uint8_t* from, int n) {
        const __mmask16 there = static_cast<__mmask16>((1u << n) - 1);
        if (kFormat == Format::kFp32) return _mm512_maskz_loadu_ps(there, from);
        return widen<kFormat>(_mm256_maskz_loadu_epi16(there, from));
    }

  private:
    template <Format kFormat>
    static Reg widen(__m256i bits) {
        if (kFormat == Format::kFp16) return _mm512_cvtph_ps(bits);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
};

#include "float_rows.inl"

MOERT_FLOAT_KERNELS("avx512");

}  // namespace

const Kernel* float_avx512(const Matrix& w, int64_t) {
    return select_float(w, kKernels);
}

}  // namespace moert

MOERT_END_TARGET
#endif
