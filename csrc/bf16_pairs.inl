// x in bf16 as pairs of numbers that follow each other in k, those of 16 tokens side by side: how tiles and broadcasts
// of the weight take it. To be included within a target region with avx512bf16 and an anonymous namespace.
//
// A packed block holds, for every 32 numbers of k, one tile of 16 pairs by 16 tokens, zeros where there are none.

#include "transpose16.inl"

constexpr int kTile = 16;
constexpr int64_t kDepth = 32;  // numbers of k that a tile product sums
constexpr int64_t kTileBytes = 1024;

inline int64_t depth_tiles(int64_t k) {
    return (k + kDepth - 1) / kDepth;
}

inline int64_t block_bytes_pairs(int64_t k) {
    return depth_tiles(k) * kTileBytes;
}

// 32 numbers of a row of x for one tile, the first 16 in `low`.
struct Numbers {
    __m512 low, high;
};

// In their order.
inline Numbers take_plain(const float* x, int64_t k, int64_t tile) {
    const float* from = x + tile * kDepth;
    const int64_t left = k - tile * kDepth;
    const __mmask16 low = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __mmask16 high = left >= 32 ? 0xffff : static_cast<__mmask16>(left > 16 ? (1u << (left - 16)) - 1 : 0);
    return {_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 16)};
}

inline __m512 pick(const float* from, __m512i which) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(from), which, _mm512_loadu_ps(from + 16));
}

// Of 64 numbers those of even k for the first tile and those of odd k for the second, and likewise of the last 32 if
// they are left over; k is a multiple of 32.
inline Numbers take_split(const float* x, int64_t k, int64_t tile) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const float* from = x + tile / 2 * 2 * kDepth;
    if ((tile | 1) * kDepth >= k) return {pick(from, even), pick(from, odd)};
    const __m512i which = tile % 2 == 0 ? even : odd;
    return {pick(from, which), pick(from + kDepth, which)};
}

// The pairs of a tile, each of all tokens.
template <Numbers kTake(const float*, int64_t, int64_t)>
inline void tile_pairs(const float* x, int tokens, int64_t k, int64_t tile, __m512i (&pairs)[kTile]) {
    for (int token = 0; token < kTile; ++token) {
        pairs[token] = _mm512_setzero_si512();
        if (token >= tokens) continue;
        const Numbers numbers = kTake(x + token * k, k, tile);
        pairs[token] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(numbers.high, numbers.low));
    }
    transpose16(pairs);
}

template <Numbers kTake(const float*, int64_t, int64_t)>
void pack_pairs(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int64_t tile = 0; tile < depth_tiles(k); ++tile) {
        __m512i pairs[kTile];
        tile_pairs<kTake>(x, tokens, k, tile, pairs);
        for (int pair = 0; pair < kTile; ++pair, block += 64) _mm512_storeu_si512(block, pairs[pair]);
    }
}

// The sums of one tile [16 rows, 16 tokens] to y[token, row].
inline void store_tile(const float* sums, int rows, int tokens, float* y, int64_t y_stride) {
    __m512i r[16];
    for (int row = 0; row < kTile; ++row) r[row] = _mm512_loadu_si512(sums + row * kTile);
    transpose16(r);
    const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
    for (int token = 0; token < tokens; ++token) _mm512_mask_storeu_epi32(y + token * y_stride, there, r[token]);
}
