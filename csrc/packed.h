// Rows of x, gathered and packed for a kernel block by block.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "pointwise.h"
#include "scratch.h"

namespace moert {

constexpr int64_t blocks_of(int64_t tokens) {
    return (tokens + kTokenBlock - 1) / kTokenBlock;
}

// Packs block number `block` of the tokens whose numbers are x[rows[i]] (or x[i] where rows is null), x [*, k].
inline void pack_block(const Kernel& kernel, Number number, const uint8_t* x, const int64_t* rows, int64_t tokens,
                       int64_t k, int64_t block, uint8_t* packed) {
    const int64_t first = block * kTokenBlock;
    const int count = static_cast<int>(tokens - first < kTokenBlock ? tokens - first : kTokenBlock);
    float* wide = thread_floats(static_cast<size_t>(count * k));
    for (int token = 0; token < count; ++token) {
        const int64_t row = rows == nullptr ? first + token : rows[first + token];
        pointwise().widen(number, x + row * k * bytes_of(number), wide + token * k, k);
    }
    kernel.pack(wide, count, k, packed + block * kernel.block_bytes(k));
}

}  // namespace moert
