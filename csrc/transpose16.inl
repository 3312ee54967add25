// To be included within a region for avx512f and an anonymous namespace.

// Lane j of rows[i] changes places with lane i of rows[j].
inline void transpose16(__m512i (&rows)[16]) {
    __m512i a[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i low = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        const __m512i high = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        const __m512i low2 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        const __m512i high2 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        a[i] = _mm512_unpacklo_epi64(low, low2);
        a[i + 1] = _mm512_unpackhi_epi64(low, low2);
        a[i + 2] = _mm512_unpacklo_epi64(high, high2);
        a[i + 3] = _mm512_unpackhi_epi64(high, high2);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88),
                      odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}
