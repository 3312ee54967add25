// What an instruction set offers for a format: how it wants x, and the product of x and some rows of a weight.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

namespace moert {

constexpr int kTokenBlock = 16;  // rows of x that are packed together

// x is packed in blocks of kTokenBlock tokens, the last of which may have fewer; block b starts at b * block_bytes(k),
// a multiple of 64, of a 64-byte aligned buffer.
struct Kernel {
    const char* name;
    int64_t (*block_bytes)(int64_t k);
    // x: [tokens, k] fp32, contiguous, 1 <= tokens <= kTokenBlock.
    void (*pack)(const float* x, int tokens, int64_t k, uint8_t* block);
    // y[token * y_stride + row - begin] = sum over k of w[row, k] * x[token, k] for begin <= row < end, all tokens.
    // Every such y is written; nothing else is. Sums are in fp32, in an order that depends on k, the format and the
    // instruction set, and on whether the tokens are few, some or many, but on no address and on no other row.
    // Unquantised weights and fp8 take x as it is. The others take it rounded to int8, with a scale for every 32
    // numbers of k, and sum exactly within those. Kernels with bf16 products (avx512_bf16 and amx, the latter for
    // quantised weights and many tokens too) instead take x, and decoded weights, rounded to bf16.
    void (*rows)(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                 int64_t y_stride);
};

// The kernel of one instruction set for a matrix, or null where it has none. `tokens` is what it will be used for.
using Select = const Kernel* (*)(const Matrix& w, int64_t tokens);

const Kernel* float_scalar(const Matrix& w, int64_t tokens);      // fp32, bf16, fp16, plain and transposed
const Kernel* quantized_scalar(const Matrix& w, int64_t tokens);  // fp8, int8, int4, mxfp4
#if defined(__x86_64__)
const Kernel* float_avx2(const Matrix& w, int64_t tokens);
const Kernel* quantized_avx2(const Matrix& w, int64_t tokens);
const Kernel* float_avx512(const Matrix& w, int64_t tokens);
const Kernel* quantized_avx512(const Matrix& w, int64_t tokens);
const Kernel* quantized_avx512_vnni(const Matrix& w, int64_t tokens);
const Kernel* float_avx512_bf16(const Matrix& w, int64_t tokens);
const Kernel* float_avx512_bf16_some(const Matrix& w, int64_t tokens);
const Kernel* float_avx512_bf16_many(const Matrix& w, int64_t tokens);
const Kernel* amx(const Matrix& w, int64_t tokens);
#endif
#if defined(__aarch64__)
const Kernel* float_neon(const Matrix& w, int64_t tokens);
const Kernel* quantized_neon(const Matrix& w, int64_t tokens);
#endif

}  // namespace moert
