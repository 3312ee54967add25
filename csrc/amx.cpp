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

MOERT_BEGIN_TARGET("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace moert {
namespace {

#include "amx_panel.inl"

void rows_bf16(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
               int64_t y_stride) {
    const int64_t row_bytes = w.k * 2;
    tile_rows(w.data + begin * row_bytes, row_bytes, end - begin, packed, tokens, w.k, y, y_stride);
    _tile_release();
}

// Up to here the kernels for few tokens read weights just as fast, or decode them faster.
constexpr int64_t kFewTokens = 4, kFewTokensDecoded = 24;

const Kernel kBf16 = {"amx bf16", block_bytes_pairs, pack_pairs, rows_bf16};
const Kernel kTransposed = {"amx bf16, transposed", block_bytes_pairs, pack_pairs, rows_panel<fill_panel_transposed>};
const Kernel kInt8 = {"amx int8", block_bytes_pairs, pack_pairs, rows_panel<fill_panel<decode_int8>>};
const Kernel kInt4 = {"amx int4", block_bytes_pairs, pack_pairs, rows_panel<fill_panel<decode_int4>>};
const Kernel kFp8 = {"amx fp8", block_bytes_pairs, pack_pairs, rows_panel<fill_panel<decode_fp8>>};
const Kernel kMxfp4 = {"amx mxfp4", block_bytes_pairs, pack_pairs, rows_panel<fill_panel<decode_mxfp4>>};

}  // namespace

const Kernel* amx(const Matrix& w, int64_t tokens) {
    if (w.format == Format::kBf16 && !w.transposed) return tokens > kFewTokens ? &kBf16 : nullptr;
    if (tokens <= kFewTokensDecoded) return nullptr;
    switch (w.format) {
        case Format::kBf16:
            return &kTransposed;
        case Format::kInt8:
            return &kInt8;
        case Format::kInt4:
            return &kInt4;
        case Format::kFp8:
            return &kFp8;
        case Format::kMxfp4:
            return &kMxfp4;
        default:
            return nullptr;
    }
}

}  // namespace moert

MOERT_END_TARGET
#endif
