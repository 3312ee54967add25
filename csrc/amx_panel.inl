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
    const __mmask16 there = groups >= kScalesAtOnce ? 0xffff : static_cast<__mmask16>((1u << groups) - 1);
    const __m512i biased = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, from));
    const __m512i bits = _mm512_max_epi32(_mm512_slli_epi32(biased, 23), _mm512_set1_epi32(0x400000));  // 2^-127
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(biased, _mm512_set1_epi32(255));
    _mm512_storeu_si512(to, _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}

// Numbers [first, first + count) of some rows, to be decoded to bf16: a whole chunk but at the end of k. `ahead` is how
// many rows on lies what will be decoded next at the same place.
struct Piece {
    int64_t row, rows, first, count, ahead;
};

inline void prefetch(const uint8_t* at, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T0);
}

void decode_int8(const Matrix& w, const Piece& piece, uint8_t* to, int64_t to_bytes) {
    const int64_t of_row = w.k / 32, groups = piece.count / 32;
    const uint8_t* codes = w.data + piece.row * w.k + piece.first;
    const uint8_t* scales = w.scales + (piece.row * of_row + piece.first / 32) * 2;
    for (int64_t row = 0; row < piece.rows; ++row, codes += w.k, scales += of_row * 2, to += to_bytes) {
        prefetch(codes + piece.ahead * w.k, piece.count);
        prefetch(scales + piece.ahead * of_row * 2, 1);
        float wide[kScalesAtOnce];
        widen_scales(scales, groups, wide);
        for (int64_t group = 0; group < groups; ++group) {
            const __m512 scale = _mm512_set1_ps(wide[group]);
            const __m128i* from = reinterpret_cast<const __m128i*>(codes + group * 32);
            const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(from));
            const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1));
            store32(to + group * 64, _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale),
                    _mm512_mul_ps(_mm512_cvtepi32_ps(high), scale));
        }
    }
}

// Kept in registers, which GCC does not do of itself: it makes constants anew for each use, by way of other registers.
struct NibbleBits {
    __m512i low = _mm512_set1_epi16(15);
    __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);  // the second 16 of a table

    NibbleBits() { __asm__("" : "+v"(low), "+v"(second)); }
};

// Two groups of codes of 4 bits, 32 bytes: their numbers of even k and then those of odd k, 64 bytes each. `table` has
// the numbers of the first group's codes and then those of the second's, in bf16.
inline void store_nibbles(__m256i codes, __m512i table, const NibbleBits& bits, uint8_t* to) {
    const __m512i words = _mm512_cvtepu8_epi16(codes);
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const __m512i even = _mm512_ternarylogic_epi32(words, bits.low, bits.second, kAndOr);
    const __m512i odd = _mm512_or_si512(_mm512_srli_epi16(words, 4), bits.second);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(even, table));
    _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi16(odd, table));
}

// The last group of an odd number of groups: even k and odd k in 64 bytes.
inline void store_nibbles_of_one(__m128i codes, __m512i table, uint8_t* to) {
    const __m256i words = _mm256_cvtepu8_epi16(codes);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(words, _mm256_set1_epi16(15))),
                                            _mm256_srli_epi16(words, 4), 1);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(both, table));
}

inline __m512i bf16_table(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Decodes the groups of a piece, of which `table(group)` gives the 16 numbers.
template <class Table>
inline void decode_nibbles(const uint8_t* codes, int64_t groups, const Table& table, const NibbleBits& bits,
                           uint8_t* to) {
    int64_t group = 0;
    for (; group + 2 <= groups; group += 2, codes += 32, to += 128)
        store_nibbles(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)),
                      bf16_table(table(group), table(group + 1)), bits, to);
    if (group < groups)
        store_nibbles_of_one(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)),
                             bf16_table(table(group), table(group)), to);
}

template <bool kZeros, int kGroupsOfScale>
inline void decode_int4_of(const Matrix& w, const Piece& piece, uint8_t* to, int64_t to_bytes) {
    const __m512 ascending = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const NibbleBits bits;
    const __m512 signed_numbers = _mm512_sub_ps(ascending, _mm512_set1_ps(8));
    const int64_t of_row = w.k / (32 * kGroupsOfScale), first = piece.first / (32 * kGroupsOfScale);
    const uint8_t* codes = w.data + (piece.row * w.k + piece.first) / 2;
    const uint8_t* scales = w.scales + (piece.row * of_row + first) * 2;
    const uint8_t* zeros = kZeros ? w.zeros + piece.row * of_row + first : nullptr;
    for (int64_t row = 0; row < piece.rows; ++row, codes += w.k / 2, scales += of_row * 2, to += to_bytes) {
        prefetch(codes + piece.ahead * (w.k / 2), piece.count / 2);
        prefetch(scales + piece.ahead * of_row * 2, 1);
        float wide[kScalesAtOnce];
        widen_scales(scales, piece.count / (32 * kGroupsOfScale), wide);
        const auto table = [&](int64_t group) {
            const int64_t at = group / kGroupsOfScale;
            const __m512 numbers = kZeros ? _mm512_sub_ps(ascending, _mm512_set1_ps(zeros[at])) : signed_numbers;
            return _mm512_mul_ps(numbers, _mm512_set1_ps(wide[at]));
        };
        decode_nibbles(codes, piece.count / 32, table, bits, to);
        if (kZeros) zeros += of_row;
    }
}

void decode_int4(const Matrix& w, const Piece& piece, uint8_t* to, int64_t to_bytes) {
    if (w.group == 32)
        return w.zeros == nullptr ? decode_int4_of<false, 1>(w, piece, to, to_bytes)
                                  : decode_int4_of<true, 1>(w, piece, to, to_bytes);
    return w.zeros == nullptr ? decode_int4_of<false, 4>(w, piece, to, to_bytes)
                              : decode_int4_of<true, 4>(w, piece, to, to_bytes);
}

void decode_mxfp4(const Matrix& w, const Piece& piece, uint8_t* to, int64_t to_bytes) {
    const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    const NibbleBits bits;
    const int64_t of_row = w.k / 32, groups = piece.count / 32;
    const uint8_t* codes = w.data + (piece.row * w.k + piece.first) / 2;
    const uint8_t* scales = w.scales + piece.row * of_row + piece.first / 32;
    for (int64_t row = 0; row < piece.rows; ++row, codes += w.k / 2, scales += of_row, to += to_bytes) {
        prefetch(codes + piece.ahead * (w.k / 2), piece.count / 2);
        prefetch(scales + piece.ahead * of_row, 1);
        float wide[kScalesAtOnce];
        widen_powers(scales, groups, wide);
        const auto table = [&](int64_t group) { return _mm512_mul_ps(values, _mm512_set1_ps(wide[group])); };
        decode_nibbles(codes, groups, table, bits, to);
    }
}

inline void decode_fp8_row(const Matrix& w, const Piece& piece, uint8_t* to) {
    const uint8_t* codes = w.data + piece.row * w.k;
    const uint8_t* scales = w.scales + piece.row / kFp8Block * ((w.k + kFp8Block - 1) / kFp8Block) * 4;
    prefetch(codes + piece.first + piece.ahead * w.k, piece.count);
    for (int64_t i = piece.first; i < piece.first + piece.count; i += 32, to += 64) {
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

void decode_fp8(const Matrix& w, const Piece& piece, uint8_t* to, int64_t to_bytes) {
    for (int64_t row = 0; row < piece.rows; ++row)
        decode_fp8_row(w, {piece.row + row, 1, piece.first, piece.count, piece.ahead}, to + row * to_bytes);
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

constexpr int64_t kPanelRows = 2 * kTile;
constexpr int64_t kChunkTiles = 8;  // of k: what is decoded is multiplied while it is in the first cache
constexpr int64_t kChunkBytes = (kChunkTiles | 1) * 64;

// The same rows for one pass of tokens, chunk by chunk. Without a second pass each chunk may overwrite the last one.
template <int kTokenTiles, void kDecode(const Matrix&, const Piece&, uint8_t*, int64_t)>
inline void decode_and_multiply(const Matrix& w, int64_t row, int64_t ahead, uint8_t* panel, int64_t row_bytes,
                                int64_t chunk_step, const uint8_t* packed, int64_t x_bytes, float* sums) {
    zero_sums<kTokenTiles>();
    const int64_t tiles = depth_tiles(w.k);
    for (int64_t tile = 0; tile < tiles; tile += kChunkTiles, panel += chunk_step) {
        const int64_t some = at_most(tiles - tile, kChunkTiles), first = tile * kDepth;
        const int64_t count = std::min(w.k - first, some * kDepth);
        kDecode(w, {row, kPanelRows, first, count, ahead}, panel, row_bytes);
        written(panel);
        add_products<kTokenTiles>(panel, row_bytes, packed + tile * kTileBytes, x_bytes, some, Ahead{});
        written(panel);  // nor may what overwrites it come sooner
    }
    store_sums<kTokenTiles>(sums);
}

template <void kDecode(const Matrix&, const Piece&, uint8_t*, int64_t)>
void rows_decoded(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                  int64_t y_stride) {
    constexpr int64_t kPassTokens = 2 * kTile;
    const bool one_pass = tokens <= kPassTokens;
    const int64_t row_bytes = one_pass ? kChunkBytes : panel_bytes(w.k), chunk_step = one_pass ? 0 : kChunkTiles * 64;
    const int64_t x_bytes = block_bytes_pairs(w.k);
    uint8_t* panel =
        thread_buffer(Buffer::kPanel, static_cast<size_t>(kPanelRows * std::max(kChunkBytes, panel_bytes(w.k))));
    alignas(64) float sums[4 * kTile * kTile];
    const int first = at_most(tokens, kTile), second = at_most(tokens - kTile, kTile);
    int64_t row = begin;
    if (end - row >= kPanelRows) configure(kTile);
    for (; row + kPanelRows <= end; row += kPanelRows) {
        const int64_t ahead = row + 2 * kPanelRows <= end ? kPanelRows : 0;
        if (second > 0)
            decode_and_multiply<2, kDecode>(w, row, ahead, panel, row_bytes, chunk_step, packed, x_bytes, sums);
        else
            decode_and_multiply<1, kDecode>(w, row, ahead, panel, row_bytes, chunk_step, packed, x_bytes, sums);
        store_sums_of_2(sums, first, second, y + row - begin, y_stride);
        if (!one_pass)
            two_tiles(panel, row_bytes, 0, packed, kPassTokens, tokens, panel_numbers(w.k), y + row - begin, y_stride);
    }
    if (row < end) {
        for (int64_t at = 0; at < w.k; at += kChunkTiles * kDepth)
            kDecode(w, {row, end - row, at, std::min(w.k - at, kChunkTiles * kDepth), 0}, panel + at * 2,
                    panel_bytes(w.k));
        written(panel);
        few_rows(panel, panel_bytes(w.k), end - row, packed, tokens, panel_numbers(w.k), y + row - begin, y_stride);
    }
    _tile_release();
}

void rows_transposed(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                     int64_t y_stride) {
    const int64_t row_bytes = panel_bytes(w.k);
    uint8_t* panel = thread_buffer(Buffer::kPanel, static_cast<size_t>(kPanelRows * row_bytes));
    for (int64_t row = begin; row < end; row += kPanelRows) {
        const int64_t rows = at_most(end - row, kPanelRows);
        for (int64_t i = 0; i < rows; i += kTile)
            gather_rows16(w, row + i, at_most(rows - i, kTile), panel + i * row_bytes, row_bytes);
        written(panel);
        if (rows == kPanelRows) {
            configure(kTile);
            two_tiles(panel, row_bytes, 0, packed, 0, tokens, panel_numbers(w.k), y + row - begin, y_stride);
        } else {
            few_rows(panel, row_bytes, rows, packed, tokens, panel_numbers(w.k), y + row - begin, y_stride);
        }
    }
    _tile_release();
}
