// bf16 weights with the dot products of AVX-512 BF16 and some tokens: those in lanes, two numbers of each side by side,
// and four weights of a row for all of them. So one load of weights does for as much as the widest product takes, of
// which one for each pair of weights and few tokens would need twice as many. No weight is repacked.
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace moert {
namespace {

#include "bf16_pairs.inl"

// A packed block has, for each four numbers of k, vectors of 8 tokens: one if there are no more, or else two.
constexpr int kVectorTokens = 8;
constexpr int kMostVectors = 3;
constexpr int64_t kFour = 4;
constexpr int kFoursOfTile = kDepth / kFour;

template <int kVectorsOfBlock>
int64_t block_bytes(int64_t k) {
    return depth_tiles(k) * kFoursOfTile * kVectorsOfBlock * 64;
}

template <int kVectorsOfBlock>
void pack(const float* x, int tokens, int64_t k, uint8_t* block) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(kVectorTokens));
    for (int64_t tile = 0; tile < depth_tiles(k); ++tile) {
        __m512i pairs[kTile];
        tile_pairs<take_plain>(x, tokens, k, tile, pairs);
        for (int pair = 0; pair < kTile; pair += 2, block += kVectorsOfBlock * 64) {
            _mm512_storeu_si512(block, _mm512_permutex2var_epi32(pairs[pair], first, pairs[pair + 1]));
            if (kVectorsOfBlock == 2)
                _mm512_storeu_si512(block + 64, _mm512_permutex2var_epi32(pairs[pair], second, pairs[pair + 1]));
        }
    }
}

struct Packed {
    const uint8_t* x;
    int64_t block_bytes;
};

template <int kRows, int kVectors, int kVectorsOfBlock>
inline __attribute__((always_inline)) void add_four(__m512 (&sums)[kRows][kVectors], const uint8_t* weight,
                                                    int64_t row_bytes, int64_t four, size_t nbytes, const Packed& x) {
    __m512bh values[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const uint8_t* block = x.x + v / kVectorsOfBlock * x.block_bytes;
        values[v] =
            reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + (four * kVectorsOfBlock + v % kVectorsOfBlock) * 64));
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
        int64_t numbers = 0;
        __builtin_memcpy(&numbers, weight + row * row_bytes + four * kFour * 2, nbytes);
        const __m512bh all = reinterpret_cast<__m512bh>(_mm512_set1_epi64(numbers));
        for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_dpbf16_ps(sums[row][v], values[v], all);
    }
}

// The products of kRows rows and the tokens of kVectors vectors, to `to`[block][row][token]. `ahead`, if not null, is
// as many rows again, which are asked for in their order.
template <int kRows, int kVectors, int kVectorsOfBlock>
inline void rows_block(const uint8_t* weight, int64_t row_bytes, const Packed& x, int64_t k, const uint8_t* ahead,
                       float* to) {
    __m512 sums[kRows][kVectors];
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_setzero_ps();
    int64_t four = 0;
    for (; (four + kFoursOfTile) * kFour <= k; four += kFoursOfTile) {
        if (ahead != nullptr) {
#pragma GCC unroll 8
            for (int line = 0; line < kRows; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(ahead + line * 64), _MM_HINT_T1);
            ahead += kRows * 64;
        }
        for (int i = 0; i < kFoursOfTile; ++i)
            add_four<kRows, kVectors, kVectorsOfBlock>(sums, weight, row_bytes, four + i, kFour * 2, x);
    }
    for (; (four + 1) * kFour <= k; ++four)
        add_four<kRows, kVectors, kVectorsOfBlock>(sums, weight, row_bytes, four, kFour * 2, x);
    if (k % kFour != 0)
        add_four<kRows, kVectors, kVectorsOfBlock>(sums, weight, row_bytes, four, static_cast<size_t>(k % kFour * 2),
                                                   x);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; v += 2) {
            const __m512 last = v + 1 < kVectors ? sums[row][v + 1] : _mm512_setzero_ps();
            _mm512_storeu_ps(to + (v / 2 * kTile + row) * kTile,
                             _mm512_add_ps(_mm512_permutex2var_ps(sums[row][v], even, last),
                                           _mm512_permutex2var_ps(sums[row][v], odd, last)));
        }
}

// y[token, row] for up to 16 rows and `tokens` tokens in kVectors vectors. The `more` rows after them are asked for.
template <int kVectors, int kVectorsOfBlock>
inline void rows_tile(const uint8_t* weight, int64_t row_bytes, int rows, int64_t more, const Packed& x, int tokens,
                      int64_t k, float* y, int64_t y_stride) {
    constexpr int kRows = 8;  // more, where they are 4 KiB apart, would not all fit in their set of the first cache
    alignas(64) float sums[(kVectors + 1) / 2 * kTile * kTile];
    int row = 0;
    for (; row + kRows <= rows; row += kRows) {
        const uint8_t* from = weight + row * row_bytes;
        const uint8_t* ahead = row + kRows <= more ? from + kTile * row_bytes : nullptr;
        rows_block<kRows, kVectors, kVectorsOfBlock>(from, row_bytes, x, k, ahead, sums + row * kTile);
    }
    for (; row < rows; ++row)
        rows_block<1, kVectors, kVectorsOfBlock>(weight + row * row_bytes, row_bytes, x, k, nullptr,
                                                 sums + row * kTile);
    for (int token = 0; token < tokens; token += kTile)
        store_tile(sums + token * kTile, rows, tokens - token < kTile ? tokens - token : kTile, y + token * y_stride,
                   y_stride);
}

template <int kVectorsOfBlock>
void rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
          int64_t y_stride) {
    const int64_t row_bytes = w.k * 2;
    const Packed x = {packed, block_bytes<kVectorsOfBlock>(w.k)};
    const int all = static_cast<int>(tokens);
    for (int64_t row = begin; row < end; row += kTile, y += kTile) {
        const uint8_t* weight = w.data + row * row_bytes;
        const int count = static_cast<int>(end - row < kTile ? end - row : kTile);
        const int64_t more = end - row - kTile;
        if (kVectorsOfBlock == 1)
            rows_tile<1, kVectorsOfBlock>(weight, row_bytes, count, more, x, all, w.k, y, y_stride);
        else if (tokens <= 2 * kVectorTokens)
            rows_tile<2, kVectorsOfBlock>(weight, row_bytes, count, more, x, all, w.k, y, y_stride);
        else
            rows_tile<kMostVectors, kVectorsOfBlock>(weight, row_bytes, count, more, x, all, w.k, y, y_stride);
    }
}

const Kernel kEight = {"avx512_bf16 bf16, some", block_bytes<1>, pack<1>, rows<1>};
const Kernel kMore = {"avx512_bf16 bf16, some more", block_bytes<2>, pack<2>, rows<2>};

}  // namespace

const Kernel* float_avx512_bf16_some(const Matrix& w, int64_t tokens) {
    if (w.format != Format::kBf16 || w.transposed || tokens > kMostVectors * kVectorTokens) return nullptr;
    return tokens <= kVectorTokens ? &kEight : &kMore;
}

}  // namespace moert

MOERT_END_TARGET
#endif
