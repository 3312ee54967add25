// bf16 weights with the dot products of AVX-512 BF16, for activations in bf16: packing rounds x to it. Those
// instructions read and write subnormal numbers as zero.
#include "kernel.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

MOERT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace moert {
namespace {

constexpr int kMostTokens = 8;
constexpr int64_t kLanes = 32;
constexpr int64_t kTileRows = 48;  // that stay in the second cache while all tokens pass by
constexpr int64_t kPrefetchBytes = 1024;

// Rows of the weight that share each load of x: all sums of a block must fit in the registers.
constexpr int row_block(int tokens) {
    return tokens <= 6 ? 4 : 3;
}

int64_t padded(int64_t k) {
    return (k + kLanes - 1) / kLanes * kLanes;
}

int64_t block_bytes(int64_t k) {
    return padded(k) * kTokenBlock * 2;
}

void pack(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int token = 0; token < tokens; ++token, x += k, block += padded(k) * 2) {
        for (int64_t i = 0; i < padded(k); i += 16) {
            const int64_t left = k - i;
            const __mmask16 there = left >= 16 ? 0xffff : static_cast<__mmask16>(left > 0 ? (1u << left) - 1 : 0);
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(block + i * 2), reinterpret_cast<__m256i>(half));
        }
    }
}

template <int kRows, int kTokens>
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
            _mm_prefetch(reinterpret_cast<const char*>(numbers + ahead), _MM_HINT_T0);
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

// Rows [begin, end); those up to `limit` will be wanted next.
template <int kTokens>
inline void some_tokens(const Matrix& w, int64_t begin, int64_t end, int64_t limit, const uint8_t* x, float* y,
                        int64_t y_stride) {
    constexpr int kRows = row_block(kTokens);
    const int64_t row_bytes = w.k * 2, x_bytes = padded(w.k) * 2;
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows)
        rows_block<kRows, kTokens>(w.data + row * row_bytes, row_bytes, x, x_bytes, w.k, y + row - begin, y_stride,
                                   row + 2 * kRows <= limit);
    for (; row < end; ++row)
        rows_block<1, kTokens>(w.data + row * row_bytes, row_bytes, x, x_bytes, w.k, y + row - begin, y_stride, false);
}

void rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
          int64_t y_stride) {
    for (int64_t row = begin; row < end; row += kTileRows) {
        const int64_t row_end = row + kTileRows < end ? row + kTileRows : end;
        int64_t passes = (tokens + kMostTokens - 1) / kMostTokens;
        for (int64_t token = 0, count; token < tokens; token += count, --passes) {
            count = (tokens - token + passes - 1) / passes;
            const uint8_t* x = packed + token * padded(w.k) * 2;
            float* to = y + token * y_stride + row - begin;
            switch (count) {
                case 1:
                    some_tokens<1>(w, row, row_end, end, x, to, y_stride);
                    break;
                case 2:
                    some_tokens<2>(w, row, row_end, end, x, to, y_stride);
                    break;
                case 3:
                    some_tokens<3>(w, row, row_end, end, x, to, y_stride);
                    break;
                case 4:
                    some_tokens<4>(w, row, row_end, end, x, to, y_stride);
                    break;
                case 5:
                    some_tokens<5>(w, row, row_end, end, x, to, y_stride);
                    break;
                case 6:
                    some_tokens<6>(w, row, row_end, end, x, to, y_stride);
                    break;
                case 7:
                    some_tokens<7>(w, row, row_end, end, x, to, y_stride);
                    break;
                default:
                    some_tokens<kMostTokens>(w, row, row_end, end, x, to, y_stride);
            }
        }
    }
}

const Kernel kKernel = {"avx512_bf16 bf16", block_bytes, pack, rows};

}  // namespace

const Kernel* float_avx512_bf16(const Matrix& w, int64_t) {
    return w.format == Format::kBf16 && !w.transposed ? &kKernel : nullptr;
}

}  // namespace moert

MOERT_END_TARGET
#endif
