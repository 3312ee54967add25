// bf16 weights with the dot products of AVX-512 BF16 and more tokens than a core can take along while it waits for
// memory: the tokens in lanes, a pair of weights for all of them. No weight is repacked, and no lanes are added up.
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace moert {
namespace {

#include "bf16_pairs.inl"

// More rows at once and, where they are a multiple of 4 KiB apart, they would not all fit in their set of the first
// cache.
constexpr int kRows = 8;
constexpr int64_t kPairBytes = 4;    // of weights
constexpr int64_t kPairsBytes = 64;  // of a pair of all tokens of a block

struct Sixteen {
    using Sums = __m512;
    using Pairs = __m512bh;
    static Sums zero() { return _mm512_setzero_ps(); }
    static Pairs load(const uint8_t* from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }
    static Pairs broadcast(int pair) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)); }
    static Sums dot(Sums sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
    static void store(float* to, Sums sums) { _mm512_storeu_ps(to, sums); }
};

struct Eight {
    using Sums = __m256;
    using Pairs = __m256bh;
    static Sums zero() { return _mm256_setzero_ps(); }
    static Pairs load(const uint8_t* from) {
        return reinterpret_cast<__m256bh>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Pairs broadcast(int pair) { return reinterpret_cast<__m256bh>(_mm256_set1_epi32(pair)); }
    static Sums dot(Sums sums, Pairs a, Pairs b) { return _mm256_dpbf16_ps(sums, a, b); }
    static void store(float* to, Sums sums) { _mm256_storeu_ps(to, sums); }
};

// Packed x: kVectors blocks.
struct Packed {
    const uint8_t* pairs;
    int64_t block_bytes;
};

template <class Vec, int kCount, int kVectors>
inline __attribute__((always_inline)) void add_pair(typename Vec::Sums (&sums)[kCount][kVectors], const uint8_t* weight,
                                                    int64_t row_bytes, int64_t pair, size_t nbytes, const Packed& x) {
    typename Vec::Pairs values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = Vec::load(x.pairs + v * x.block_bytes + pair * kPairsBytes);
#pragma GCC unroll 8
    for (int row = 0; row < kCount; ++row) {
        int numbers = 0;
        __builtin_memcpy(&numbers, weight + row * row_bytes + pair * kPairBytes, nbytes);
        const typename Vec::Pairs both = Vec::broadcast(numbers);
        for (int v = 0; v < kVectors; ++v) sums[row][v] = Vec::dot(sums[row][v], values[v], both);
    }
}

// The products of kCount rows and the tokens of kVectors blocks, to `to`[block][row][token]. `ahead`, if not null, is
// as many rows again, which are asked for in their order.
template <class Vec, int kCount, int kVectors>
inline void rows_block(const uint8_t* weight, int64_t row_bytes, const Packed& x, int64_t k, const uint8_t* ahead,
                       float* to) {
    typename Vec::Sums sums[kCount][kVectors];
    for (int row = 0; row < kCount; ++row)
        for (int v = 0; v < kVectors; ++v) sums[row][v] = Vec::zero();
    constexpr int kPairs = kDepth / 2;
    int64_t pair = 0;
    for (; pair + kPairs <= k / 2; pair += kPairs) {
        if (ahead != nullptr) {
#pragma GCC unroll 8
            for (int line = 0; line < kCount; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(ahead + line * 64), _MM_HINT_T1);
            ahead += kCount * 64;
        }
        for (int i = 0; i < kPairs; ++i)
            add_pair<Vec, kCount, kVectors>(sums, weight, row_bytes, pair + i, kPairBytes, x);
    }
    for (; pair < k / 2; ++pair) add_pair<Vec, kCount, kVectors>(sums, weight, row_bytes, pair, kPairBytes, x);
    if (k % 2 != 0) add_pair<Vec, kCount, kVectors>(sums, weight, row_bytes, pair, kPairBytes / 2, x);
    for (int row = 0; row < kCount; ++row)
        for (int v = 0; v < kVectors; ++v) Vec::store(to + (v * kTile + row) * kTile, sums[row][v]);
}

// y[token, row] for up to 16 rows and `tokens` tokens in kVectors blocks. The `more` rows after them are asked for.
template <class Vec, int kVectors>
inline void rows_tile(const uint8_t* weight, int64_t row_bytes, int rows, int64_t more, const Packed& x, int tokens,
                      int64_t k, float* y, int64_t y_stride) {
    alignas(64) float sums[kVectors * kTile * kTile];
    int row = 0;
    for (; row + kRows <= rows; row += kRows) {
        const uint8_t* from = weight + row * row_bytes;
        const uint8_t* ahead = row + kRows <= more ? from + kTile * row_bytes : nullptr;
        rows_block<Vec, kRows, kVectors>(from, row_bytes, x, k, ahead, sums + row * kTile);
    }
    for (; row < rows; ++row)
        rows_block<Vec, 1, kVectors>(weight + row * row_bytes, row_bytes, x, k, nullptr, sums + row * kTile);
    for (int v = 0; v < kVectors; ++v) {
        const int left = tokens - v * kTile;
        store_tile(sums + v * kTile * kTile, rows, left < kTile ? left : kTile, y + v * kTile * y_stride, y_stride);
    }
}

void rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
          int64_t y_stride) {
    constexpr int kPass = 2 * kTile;
    const int64_t row_bytes = w.k * 2, block_bytes = block_bytes_pairs(w.k);
    for (int64_t row = begin; row < end; row += kTile) {
        const uint8_t* weight = w.data + row * row_bytes;
        const int count = static_cast<int>(end - row < kTile ? end - row : kTile);
        for (int64_t token = 0; token < tokens; token += kPass) {
            const Packed x = {packed + token / kTile * block_bytes, block_bytes};
            const int some = static_cast<int>(tokens - token < kPass ? tokens - token : kPass);
            const int64_t more = token == 0 ? end - row - kTile : 0;
            float* to = y + token * y_stride + row - begin;
            if (some <= kTile / 2)
                rows_tile<Eight, 1>(weight, row_bytes, count, more, x, some, w.k, to, y_stride);
            else if (some <= kTile)
                rows_tile<Sixteen, 1>(weight, row_bytes, count, more, x, some, w.k, to, y_stride);
            else
                rows_tile<Sixteen, 2>(weight, row_bytes, count, more, x, some, w.k, to, y_stride);
        }
    }
}

const Kernel kKernel = {"avx512_bf16 bf16, many", block_bytes_pairs, pack_pairs<take_plain>, rows};

}  // namespace

const Kernel* float_avx512_bf16_many(const Matrix& w, int64_t) {
    return w.format == Format::kBf16 && !w.transposed ? &kKernel : nullptr;
}

}  // namespace moert

MOERT_END_TARGET
#endif
