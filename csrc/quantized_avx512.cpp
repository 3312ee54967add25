// Quantised weights with AVX-512, without VNNI.
#include "cpu.h"
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace moert {
namespace {

#include "quantized_avx512.inl"

struct Vec : Avx512 {
    static constexpr bool kBiased = false;
    static constexpr int kManyTile = 8;  // tokens of a tile
    static constexpr int kFp8TileRows = 4;
    static constexpr int kFp8TileTokens = 4;

    static Int int8_codes(Int codes) { return codes; }
    // The sign of w moves to x: 128 * 127 * 2 is the largest sum of two products, and fits 16 bits.
    static Int dot_int8(Int sum, Int w, Int x) {
        const Int with = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
        return _mm512_add_epi32(sum, pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(w), with)));
    }
    // Of unsigned bytes up to 24 with signed ones: four products are at most 12192.
    static Int dot_pair(Int sum, Int w0, Int x0, Int w1, Int x1) {
        return _mm512_add_epi32(sum,
                                pairs(_mm512_add_epi16(_mm512_maddubs_epi16(w0, x0), _mm512_maddubs_epi16(w1, x1))));
    }

  private:
    static Int pairs(Int words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }
};

#include "quantized_pack.inl"
#include "quantized_few.inl"
#include "quantized_many.inl"
#include "quantized_fp8.inl"
#include "quantized_kernels.inl"

MOERT_QUANTIZED_KERNELS("avx512");

}  // namespace

const Kernel* quantized_avx512(const Matrix& w, int64_t tokens) {
    return select_quantized(kChoices, w, tokens);
}

}  // namespace moert

MOERT_END_TARGET
#endif
