// Some rows of a weight as plain bf16 rows, which tiles can be loaded from. To be included as amx_tiles.inl, which it
// includes.
//
// A panel row has `panel_numbers(k)` numbers, zeros after the k-th, and starts `panel_bytes(k)` after the one before:
// an odd number of cache lines, so that a tile's 16 rows do not fall into one set of the cache.

#include "amx_tiles.inl"

inline int64_t panel_numbers(int64_t k) {
    return depth_tiles(k) * kDepth;
}

inline int64_t panel_bytes(int64_t k) {
    return (depth_tiles(k) | 1) * 64;
}

// 32 numbers, the first 16 in `low`.
inline void store32(uint8_t* to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

constexpr int64_t kScalesAtOnce = 16;

// The fp16 scales of up to 16 groups, widened.
inline void widen_scales(const uint8_t* from, int64_t groups, float (&to)[kScalesAtOnce]) {
    const __mmask16 there = groups >= kScalesAtOnce ? 0xffff : static_cast<__mmask16>((1u << groups) - 1);
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from)));
}

// The e8m0 scales of up to 16 groups; 255 is NaN.
inline void widen_powers(const uint8_t* from, int64_t groups, float (&to)[kScalesAtOnce]) {
    for (int64_t group = 0; group < groups && group < kScalesAtOnce; ++group) {
        const uint32_t exponent = from[group];
        const uint32_t bits = exponent == 255 ? 0x7fc00000u : exponent == 0 ? 0x00400000u : exponent << 23;
        __builtin_memcpy(&to[group], &bits, sizeof bits);
    }
}

void decode_int8(const Matrix& w, int64_t row, uint8_t* to) {
    const int64_t groups = w.k / 32;
    const uint8_t* codes = w.data + row * w.k;
    const uint8_t* scales = w.scales + row * groups * 2;
    float wide[kScalesAtOnce];
    for (int64_t group = 0; group < groups; ++group, codes += 32, to += 64) {
        if (group % kScalesAtOnce == 0) widen_scales(scales + group * 2, groups - group, wide);
        _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
        const __m512 scale = _mm512_set1_ps(wide[group % kScalesAtOnce]);
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16));
        store32(to, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), scale),
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)), scale));
    }
}

// The numbers of 16 bytes of codes, in their order: a code's low 4 bits choose one of 16.
inline void store_nibbles(const uint8_t* codes, __m512 table, uint8_t* to) {
    const __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i odd = _mm_srli_epi16(even, 4);
    const __m512i low = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
    const __m512i high = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd));
    store32(to, _mm512_permutexvar_ps(low, table), _mm512_permutexvar_ps(high, table));
}

void decode_int4(const Matrix& w, int64_t row, uint8_t* to) {
    const __m512 ascending = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int64_t groups = w.k / w.group, pieces = w.group / 32;
    const uint8_t* codes = w.data + row * (w.k / 2);
    const uint8_t* scales = w.scales + row * groups * 2;
    const uint8_t* zeros = w.zeros == nullptr ? nullptr : w.zeros + row * groups;
    float wide[kScalesAtOnce];
    for (int64_t group = 0; group < groups; ++group) {
        if (group % kScalesAtOnce == 0) widen_scales(scales + group * 2, groups - group, wide);
        const __m512 zero = _mm512_set1_ps(zeros == nullptr ? 8 : zeros[group]);
        const __m512 table = _mm512_mul_ps(_mm512_sub_ps(ascending, zero), _mm512_set1_ps(wide[group % kScalesAtOnce]));
        _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
        for (int64_t piece = 0; piece < pieces; ++piece, codes += 16, to += 64) store_nibbles(codes, table, to);
    }
}

void decode_mxfp4(const Matrix& w, int64_t row, uint8_t* to) {
    const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    const int64_t groups = w.k / 32;
    const uint8_t* codes = w.data + row * (w.k / 2);
    const uint8_t* scales = w.scales + row * groups;
    float wide[kScalesAtOnce];
    for (int64_t group = 0; group < groups; ++group, codes += 16, to += 64) {
        if (group % kScalesAtOnce == 0) widen_powers(scales + group, groups - group, wide);
        _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
        store_nibbles(codes, _mm512_mul_ps(values, _mm512_set1_ps(wide[group % kScalesAtOnce])), to);
    }
}

void decode_fp8(const Matrix& w, int64_t row, uint8_t* to) {
    const uint8_t* codes = w.data + row * w.k;
    const uint8_t* scales = w.scales + row / kFp8Block * ((w.k + kFp8Block - 1) / kFp8Block) * 4;
    for (int64_t i = 0; i < w.k; i += 32, to += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + i + 1024), _MM_HINT_T0);
        const int64_t left = w.k - i;
        const __mmask32 there = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        float block_scale;
        __builtin_memcpy(&block_scale, scales + i / kFp8Block * 4, sizeof block_scale);
        // The bits of e4m3 as those of fp16 are 2^-8 of the number, subnormal ones too.
        const __m512 scale = _mm512_set1_ps(block_scale * 256.0f);
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, codes + i));
        const __m512i size = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x7f)), 7);
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
        const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x3f80));
        const __m512i half = _mm512_mask_mov_epi16(_mm512_or_si512(size, sign), nan, _mm512_set1_epi16(0x7e00));
        store32(to, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), scale),
                _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), scale));
    }
}

// Rows [row, row + 16) of a transposed bf16 weight [k, n], of which `rows` are there.
void gather_rows16(const Matrix& w, int64_t row, int rows, uint8_t* to, int64_t to_bytes) {
    const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
    const uint8_t* from = w.data + row * 2;
    for (int64_t tile = 0; tile < depth_tiles(w.k); ++tile) {
        __m512i pairs[16];
        for (int pair = 0; pair < 16; ++pair) {
            const int64_t k = tile * kDepth + 2 * pair;
            const __m256i none = _mm256_setzero_si256();
            const __m256i first = k < w.k ? _mm256_maskz_loadu_epi16(there, from + k * w.n * 2) : none;
            const __m256i second = k + 1 < w.k ? _mm256_maskz_loadu_epi16(there, from + (k + 1) * w.n * 2) : none;
            pairs[pair] =
                _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
        }
        transpose16(pairs);
        for (int r = 0; r < rows; ++r) _mm512_storeu_si512(to + r * to_bytes + tile * 64, pairs[r]);
    }
}

template <void kDecode(const Matrix&, int64_t, uint8_t*)>
inline void fill_panel(const Matrix& w, int64_t begin, int64_t end, uint8_t* panel) {
    for (int64_t row = begin; row < end; ++row, panel += panel_bytes(w.k)) kDecode(w, row, panel);
}

inline void fill_panel_transposed(const Matrix& w, int64_t begin, int64_t end, uint8_t* panel) {
    for (int64_t row = begin; row < end; row += kTile)
        gather_rows16(w, row, at_most(end - row, kTile), panel + (row - begin) * panel_bytes(w.k), panel_bytes(w.k));
}

constexpr int64_t kPanelRows = 32;

template <void kFill(const Matrix&, int64_t, int64_t, uint8_t*)>
void rows_panel(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                int64_t y_stride) {
    uint8_t* panel = thread_buffer(Buffer::kPanel, static_cast<size_t>(kPanelRows * panel_bytes(w.k)));
    for (int64_t row = begin; row < end; row += kPanelRows) {
        const int64_t rows = at_most(end - row, kPanelRows);
        kFill(w, row, row + rows, panel);
        tile_rows(panel, panel_bytes(w.k), rows, packed, tokens, panel_numbers(w.k), y + row - begin, y_stride);
    }
    _tile_release();
}
