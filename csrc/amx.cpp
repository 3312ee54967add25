// Products of more than a few tokens with the tiles of AMX: bf16 weights as they are, others decoded to bf16 some rows
// at a time. Packing rounds x to bf16, and decoding rounds quantised weights to it (to 2^-9 of each number, far below
// what quantising them cost); sums are in fp32; subnormal numbers count as zero.
//
// The int8 tiles of AMX are not used: with a scale for every 32 numbers their sums would have to leave the tile after
// half a tile's depth, which costs more than decoding the weights once for all tokens.
#include "kernel.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

MOERT_BEGIN_TARGET("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace moert {
namespace {

#include "amx_panel.inl"

void rows_bf16(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
               int64_t y_stride) {
    constexpr int64_t kRows = 2 * kTile;
    const int64_t row_bytes = w.k * 2;
    int64_t row = begin;
    if (end - row >= kRows) configure(kTile);
    for (; row + kRows <= end; row += kRows) {
        const uint8_t* a = w.data + row * row_bytes;
        two_tiles(a, row_bytes, at_most(end - row - kRows, kRows), packed, 0, tokens, w.k, y + row - begin, y_stride);
    }
    few_rows(w.data + row * row_bytes, row_bytes, end - row, packed, tokens, w.k, y + row - begin, y_stride);
    _tile_release();
}

// Up to here the kernels for few tokens read weights just as fast, or decode them faster.
constexpr int64_t kFewTokens = 4, kFewTokensScaled = 16, kFewTokensDecoded = 24;

template <Numbers kTake(const float*, int64_t, int64_t), void kDecode(const Matrix&, const Piece&, uint8_t*, int64_t)>
constexpr Kernel decoded(const char* name) {
    return {name, block_bytes_pairs, pack_pairs<kTake>, rows_decoded<kDecode>};
}

const Kernel kBf16 = {"amx bf16", block_bytes_pairs, pack_pairs<take_plain>, rows_bf16};
const Kernel kTransposed = {"amx bf16, transposed", block_bytes_pairs, pack_pairs<take_plain>, rows_transposed};
const Kernel kInt8 = decoded<take_plain, decode_int8>("amx int8");
const Kernel kInt4 = decoded<take_split, decode_int4>("amx int4");
const Kernel kFp8 = decoded<take_plain, decode_fp8>("amx fp8");
const Kernel kMxfp4 = decoded<take_split, decode_mxfp4>("amx mxfp4");

}  // namespace

const Kernel* amx(const Matrix& w, int64_t tokens) {
    const auto above = [&](int64_t few, const Kernel& kernel) { return tokens > few ? &kernel : nullptr; };
    switch (w.format) {
        case Format::kBf16:
            return w.transposed ? above(kFewTokensDecoded, kTransposed) : above(kFewTokens, kBf16);
        case Format::kInt8:
            return above(kFewTokensScaled, kInt8);
        case Format::kInt4:
            return above(kFewTokensScaled, kInt4);
        case Format::kFp8:
            return above(kFewTokensDecoded, kFp8);
        case Format::kMxfp4:
            return above(kFewTokensDecoded, kMxfp4);
        default:
            return nullptr;
    }
}

}  // namespace moert

MOERT_END_TARGET
#endif
