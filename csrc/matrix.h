// A weight matrix as the kernels see it: [n, k] numbers in one of the formats, read where they are.
#pragma once

#include <cstdint>

namespace moert {

enum class Format : int { kFp32, kBf16, kFp16, kFp8, kInt8, kInt4, kMxfp4 };

constexpr int kFormats = 7;
constexpr int64_t kFp8Block = 128;  // rows and columns that share a scale

// y = x W^T for W [n, k]. No pointer needs more than the alignment of its numbers.
//
//   format   data                                      scales                                   group
//   fp32...  [n, k], or [k, n] if transposed           none                                     -
//   fp8      uint8 [n, k], e4m3                        fp32 [ceil(n/128), ceil(k/128)]          128
//   int8     int8 [n, k]                               fp16 [n, k/32]                           32
//   int4     uint8 [n, k/2], number 2j in the low      fp16 [n, k/group]; zeros (or null: all   32 or 128
//            nibble of byte j, 2j+1 in the high one    are 8) uint8 [n, k/group], 0..15
//   mxfp4    as int4, e2m1                             uint8 e8m0 [n, k/32]                     32
//
// A quantised number is (code - zero) * scale. k is a multiple of the group, but for fp8, whose last block may be
// short.
struct Matrix {
    Format format = Format::kFp32;
    bool transposed = false;
    int group = 0;
    int64_t n = 0, k = 0;
    const uint8_t* data = nullptr;
    const uint8_t* scales = nullptr;
    const uint8_t* zeros = nullptr;
};

}  // namespace moert
