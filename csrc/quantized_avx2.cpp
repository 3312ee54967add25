// Quantised weights with AVX2, FMA and F16C.
#include "cpu.h"
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx2,fma,f16c")

namespace moert {
namespace {

struct Vec {
    using Int = __m256i;
    using Float = __m256;
    static constexpr int kLanes = 8;
    static constexpr bool kBiased = false;
    static constexpr int kManyTile = 4;  // tokens of a tile
    static constexpr int kFp8TileRows = 2;
    static constexpr int kFp8TileTokens = 4;

    static Int load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    // The first `count` bytes; the rest are 0.
    static Int load_some(const uint8_t* from, int64_t count) {
        if (count >= 32) return load(from);
        alignas(32) uint8_t there[32] = {};
        __builtin_memcpy(there, from, static_cast<size_t>(count));
        return load(there);
    }
    static void store(void* to, Int value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
    static Int zero() { return _mm256_setzero_si256(); }
    static Int broadcast_int(const void* from) {
        int32_t value;
        __builtin_memcpy(&value, from, sizeof value);
        return _mm256_set1_epi32(value);
    }
    static Int low_nibbles(Int codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
    static Int high_nibbles(Int codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }
    // table: 16 bytes, indexed by bytes below 16.
    static Int look_up(const int8_t* table, Int indices) {
        const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), indices);
    }
    // Products of the low 16 bits of each lane, for numbers that fit.
    static Int multiply(Int a, Int b) { return _mm256_madd_epi16(a, b); }

    static Int int8_codes(Int codes) { return codes; }
    // The sign of w moves to x: 128 * 127 * 2 is the largest sum of two products, and fits 16 bits.
    static Int dot_int8(Int sum, Int w, Int x) {
        return _mm256_add_epi32(sum, pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))));
    }
    // Of unsigned bytes up to 24 with signed ones: four products are at most 12192.
    static Int dot_pair(Int sum, Int w0, Int x0, Int w1, Int x1) {
        return _mm256_add_epi32(sum,
                                pairs(_mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1))));
    }

    static Float load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
    static Float broadcast(float value) { return _mm256_set1_ps(value); }
    static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
    static Int bits(Float value) { return _mm256_castps_si256(value); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(Float value) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    }

    // Lane i becomes lane first + i / kRun.
    template <int kRun>
    static Int spread(Int value, int first) {
        return _mm256_permutevar8x32_epi32(value, spread_index<kRun>(first));
    }
    template <int kRun>
    static Float spread(Float value, int first) {
        return _mm256_permutevar8x32_ps(value, spread_index<kRun>(first));
    }

    // The first `count` (at most kLanes) fp16 numbers, uint8 numbers or e8m0 scales; the rest are 0.
    static Float halves(const uint8_t* from, int count) { return _mm256_cvtph_ps(some_bytes(from, 2 * count)); }
    static Int bytes(const uint8_t* from, int count) { return _mm256_cvtepu8_epi32(some_bytes(from, count)); }
    static Float powers(const uint8_t* from, int count) {
        const Int biased = bytes(from, count);
        Int bits = _mm256_max_epi32(_mm256_slli_epi32(biased, 23), _mm256_set1_epi32(0x400000));  // 2^-127
        bits = _mm256_or_si256(
            bits, _mm256_and_si256(_mm256_cmpeq_epi32(biased, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x7fc00000)));
        const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
    }

    // Lane j of rows[i] changes places with lane i of rows[j].
    static void transpose(Int (&rows)[8]) {
        Int a[8];
        for (int i = 0; i < 8; i += 4) {
            const Int low = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
            const Int high = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
            const Int low2 = _mm256_unpacklo_epi32(rows[i + 2], rows[i + 3]);
            const Int high2 = _mm256_unpackhi_epi32(rows[i + 2], rows[i + 3]);
            a[i] = _mm256_unpacklo_epi64(low, low2);
            a[i + 1] = _mm256_unpackhi_epi64(low, low2);
            a[i + 2] = _mm256_unpacklo_epi64(high, high2);
            a[i + 3] = _mm256_unpackhi_epi64(high, high2);
        }
        for (int i = 0; i < 4; ++i) {
            rows[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
            rows[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
        }
    }

    // 32 codes of e4m3, as values times 2^-8 in the order 0..7, 16..23, 8..15, 24..31. A NaN comes out as a number.
    static void e4m3(Int codes, Float (&values)[4]) {
        for (int half = 0; half < 2; ++half) {
            Int words = half == 0 ? _mm256_unpacklo_epi8(zero(), codes) : _mm256_unpackhi_epi8(zero(), codes);
            words = _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
            values[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
            values[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
        }
    }
    // Remembers in `seen` whether there was a NaN among codes of e4m3: only theirs are 254 when doubled.
    static Int e4m3_seen(Int seen, Int codes) { return _mm256_max_epu8(seen, _mm256_add_epi8(codes, codes)); }
    static bool e4m3_saw_nan(Int seen) {
        return _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8(-2))) != 0;
    }

  private:
    static Int pairs(Int words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

    static __m128i some_bytes(const uint8_t* from, int count) {
        if (count == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        if (count == 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        alignas(16) uint8_t there[16] = {};
        __builtin_memcpy(there, from, static_cast<size_t>(count));
        return _mm_load_si128(reinterpret_cast<const __m128i*>(there));
    }

    template <int kRun>
    static Int spread_index(int first) {
        const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_add_epi32(_mm256_srli_epi32(lane, kRun == 8 ? 3 : 2), _mm256_set1_epi32(first));
    }
};

#include "quantized_pack.inl"
#include "quantized_few.inl"
#include "quantized_many.inl"
#include "quantized_fp8.inl"
#include "quantized_kernels.inl"

MOERT_QUANTIZED_KERNELS("avx2");

}  // namespace

const Kernel* quantized_avx2(const Matrix& w, int64_t tokens) {
    return select_quantized(kChoices, w, tokens);
}

}  // namespace moert

MOERT_END_TARGET
#endif
