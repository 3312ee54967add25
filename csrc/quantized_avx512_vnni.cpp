// Quantised weights with AVX-512 and its VNNI.
#include "cpu.h"
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

namespace moert {
namespace {

#include "quantized_avx512.inl"

struct Vec : Avx512 {
    static constexpr bool kBiased = true;  // int8 codes are made unsigned by adding 128
    static constexpr int kManyTile = 8;    // tokens of a tile
    static constexpr int kFp8TileRows = 4;
    static constexpr int kFp8TileTokens = 4;

    static Int int8_codes(Int codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
    static Int dot_int8(Int sum, Int w, Int x) { return _mm512_dpbusd_epi32(sum, w, x); }
    // Of unsigned bytes up to 24 with signed ones.
    static Int dot_pair(Int sum, Int w0, Int x0, Int w1, Int x1) {
        return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w0, x0), w1, x1);
    }
};

#include "quantized_pack.inl"
#include "quantized_few.inl"
#include "quantized_many.inl"
#include "quantized_fp8.inl"
#include "quantized_kernels.inl"

MOERT_QUANTIZED_KERNELS("avx512_vnni");

}  // namespace

const Kernel* quantized_avx512_vnni(const Matrix& w, int64_t tokens) {
    return select_quantized(kChoices, w, tokens);
}

}  // namespace moert

MOERT_END_TARGET
#endif
