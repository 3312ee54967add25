// What the quantised kernels need of a vector with AVX-512 F, BW, VL and DQ, but for the integer products. To be
// included within a target region and an anonymous namespace.

#include "transpose16.inl"

struct Avx512 {
    using Int = __m512i;
    using Float = __m512;
    static constexpr int kLanes = 16;

    static Int load(const void* from) { return _mm512_loadu_si512(from); }
    // The first `count` bytes; the rest are 0.
    static Int load_some(const uint8_t* from, int64_t count) {
        return count >= 64 ? load(from) : _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, from);
    }
    static void store(void* to, Int value) { _mm512_storeu_si512(to, value); }
    static Int zero() { return _mm512_setzero_si512(); }
    static Int broadcast_int(const void* from) {
        int32_t value;
        __builtin_memcpy(&value, from, sizeof value);
        return _mm512_set1_epi32(value);
    }
    static Int low_nibbles(Int codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
    static Int high_nibbles(Int codes) { return low_nibbles(_mm512_srli_epi16(codes, 4)); }
    // table: 16 bytes, indexed by bytes below 16.
    static Int look_up(const int8_t* table, Int indices) {
        const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), indices);
    }
    // Products of the low 16 bits of each lane, for numbers that fit.
    static Int multiply(Int a, Int b) { return _mm512_madd_epi16(a, b); }

    static Float load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
    static Float broadcast(float value) { return _mm512_set1_ps(value); }
    static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Float value) { return _mm512_reduce_add_ps(value); }

    // Lane i becomes lane first + i / kRun.
    template <int kRun>
    static Int spread(Int value, int first) {
        return _mm512_permutexvar_epi32(spread_index<kRun>(first), value);
    }
    template <int kRun>
    static Float spread(Float value, int first) {
        return _mm512_permutexvar_ps(spread_index<kRun>(first), value);
    }

    // The first `count` (at most kLanes) fp16 numbers, uint8 numbers or e8m0 scales; the rest are 0.
    static Float halves(const uint8_t* from, int count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
    }
    static Int bytes(const uint8_t* from, int count) {
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from));
    }
    static Float powers(const uint8_t* from, int count) {
        const Int biased = bytes(from, count);
        const Int bits = _mm512_max_epi32(_mm512_slli_epi32(biased, 23), _mm512_set1_epi32(0x400000));  // 2^-127
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(biased, _mm512_set1_epi32(255));
        const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
        return _mm512_castsi512_ps(
            _mm512_maskz_mov_epi32(there, _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000))));
    }

    static Int bits(Float value) { return _mm512_castps_si512(value); }

    static void transpose(Int (&rows)[16]) { transpose16(rows); }

    // 64 codes of e4m3, as values times 2^-8 in the order 0..7, 16..23, 8..15, 24..31, then likewise from 32 on. A NaN
    // comes out as a number.
    static void e4m3(Int codes, Float (&values)[4]) {
        for (int half = 0; half < 2; ++half) {
            Int words = half == 0 ? _mm512_unpacklo_epi8(zero(), codes) : _mm512_unpackhi_epi8(zero(), codes);
            words = _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
            values[half] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
            values[half + 2] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
        }
    }
    // Remembers in `seen` whether there was a NaN among codes of e4m3: only theirs are 254 when doubled.
    static Int e4m3_seen(Int seen, Int codes) { return _mm512_max_epu8(seen, _mm512_add_epi8(codes, codes)); }
    static bool e4m3_saw_nan(Int seen) { return _mm512_cmpeq_epi8_mask(seen, _mm512_set1_epi8(-2)) != 0; }

  private:
    template <int kRun>
    static Int spread_index(int first) {
        const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_add_epi32(_mm512_srli_epi32(lane, kRun == 8 ? 3 : 2), _mm512_set1_epi32(first));
    }
};
