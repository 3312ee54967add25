// bf16 weights with the dot products of AVX-512 BF16, for activations in bf16: packing rounds x to it. Those
// instructions read and write subnormal numbers as zero.
#include "cpu.h"
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace moert {
namespace {

constexpr int kMostTokens = 4, kMostTokensOfStream = 2;
constexpr int kRowBlock = 4;  // rows of the weight that share each load of x, unless they are read as one stream
constexpr int64_t kLanes = 32;
constexpr int64_t kPrefetchBytes = 1024;

int64_t padded(int64_t k) {
    return (k + kLanes - 1) / kLanes * kLanes;
}

// Of a token's packed row: an odd number of cache lines, so that the rows of several do not fall into one set of the
// first cache.
int64_t x_row_bytes(int64_t k) {
    return (padded(k) / kLanes | 1) * kLanes * 2;
}

int64_t block_bytes(int64_t k) {
    return x_row_bytes(k) * kTokenBlock;
}

void pack(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int token = 0; token < tokens; ++token, x += k, block += x_row_bytes(k)) {
        for (int64_t i = 0; i < padded(k); i += 16) {
            const int64_t left = k - i;
            const __mmask16 there = left >= 16 ? 0xffff : static_cast<__mmask16>(left > 0 ? (1u << left) - 1 : 0);
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(block + i * 2), reinterpret_cast<__m256i>(half));
        }
    }
}

template <int kRows, int kTokens, bool kOneStream>
inline void rows_block(const uint8_t* weight, int64_t row_bytes, const uint8_t* x, int64_t x_bytes, int64_t k, float* y,
                       int64_t y_stride, bool more_rows) {
    __m512 sums[kRows][kTokens];
    for (int row = 0; row < kRows; ++row)
        for (int token = 0; token < kTokens; ++token) sums[row][token] = _mm512_setzero_ps();
    // What lies ahead of a row's end is the next row, which is being read: there the rows of the next block are wanted.
    const int64_t last = k - kPrefetchBytes / 2;
    const int64_t beyond = kPrefetchBytes + (more_rows ? (kRows - 1) * row_bytes : 0);
    for (int64_t i = 0; i < k; i += kLanes) {
        const int64_t ahead = i < last ? kPrefetchBytes : beyond;
        const int64_t left = k - i;
        const __mmask32 there = left >= kLanes ? 0xffffffffu : (1u << left) - 1;
        __m512bh w[kRows];
        // Without these GCC keeps the sums in memory.
        _Pragma("GCC unroll 8") for (int row = 0; row < kRows; ++row) {
            const uint8_t* numbers = weight + row * row_bytes + i * 2;
            if (!kOneStream) _mm_prefetch(reinterpret_cast<const char*>(numbers + ahead), _MM_HINT_T0);
            w[row] = reinterpret_cast<__m512bh>(left >= kLanes ? _mm512_loadu_si512(numbers)
                                                               : _mm512_maskz_loadu_epi16(there, numbers));
        }
        _Pragma("GCC unroll 8") for (int token = 0; token < kTokens; ++token) {
            const __m512bh value = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + token * x_bytes + i * 2));
            _Pragma("GCC unroll 8") for (int row = 0; row < kRows; ++row) sums[row][token] =
                _mm512_dpbf16_ps(sums[row][token], w[row], value);
        }
    }
    for (int row = 0; row < kRows; ++row)
        for (int token = 0; token < kTokens; ++token)
            y[token * y_stride + row] = _mm512_reduce_add_ps(sums[row][token]);
}

template <int kTokens>
inline void some_tokens(const Matrix& w, int64_t begin, int64_t end, const uint8_t* x, float* y, int64_t y_stride) {
    const int64_t row_bytes = w.k * 2, x_bytes = x_row_bytes(w.k);
    const uint8_t* weight = w.data + begin * row_bytes;
    const int64_t blocks = reads_one_stream() ? 0 : (end - begin) / kRowBlock;
    for (int64_t block = 0; block < blocks; ++block, weight += kRowBlock * row_bytes, y += kRowBlock)
        rows_block<kRowBlock, kTokens, false>(weight, row_bytes, x, x_bytes, w.k, y, y_stride, block + 1 < blocks);
    for (int64_t row = begin + blocks * kRowBlock; row < end; ++row, weight += row_bytes, ++y)
        rows_block<1, kTokens, true>(weight, row_bytes, x, x_bytes, w.k, y, y_stride, false);
}

void rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
          int64_t y_stride) {
    switch (tokens) {
        case 1:
            return some_tokens<1>(w, begin, end, packed, y, y_stride);
        case 2:
            return some_tokens<2>(w, begin, end, packed, y, y_stride);
        case 3:
            return some_tokens<3>(w, begin, end, packed, y, y_stride);
        default:
            return some_tokens<kMostTokens>(w, begin, end, packed, y, y_stride);
    }
}

const Kernel kKernel = {"avx512_bf16 bf16", block_bytes, pack, rows};

}  // namespace

const Kernel* float_avx512_bf16(const Matrix& w, int64_t tokens) {
    if (w.format != Format::kBf16 || w.transposed) return nullptr;
    // Row by row, more tokens take longer than the processor's own prefetching looks ahead.
    if (tokens <= (reads_one_stream() ? kMostTokensOfStream : kMostTokens)) return &kKernel;
    const Kernel* some = float_avx512_bf16_some(w, tokens);
    return some != nullptr ? some : float_avx512_bf16_many(w, tokens);
}

}  // namespace moert

MOERT_END_TARGET
#endif
