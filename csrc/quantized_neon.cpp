// Quantised weights with NEON, and with the products of DotProd where the processor has them.
#include "kernel.h"
#include "target.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>

#include <cstddef>

namespace moert {
namespace {

constexpr int kRowBlock = 4;  // rows of the weight that share each load of x; their sums fill a vector
constexpr int kMostTokens = 4;
constexpr int64_t kGroup = 32;
constexpr int64_t kPrefetchBytes = 1024;
constexpr float kTiny = 0x1p-119f;  // groups of x below are taken for zeros: their scale would be subnormal

// A group of a token, packed for int8 products.
struct PackedGroup {
    int8_t codes[kGroup];
    float scale;
    int32_t sum;  // of the codes
};

constexpr int64_t token_bytes(int64_t k) {
    return k / kGroup * static_cast<int64_t>(sizeof(PackedGroup));
}

int64_t block_bytes_int8(int64_t k) {
    return kTokenBlock * token_bytes(k);
}

inline int8x16_t narrow(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    return vcombine_s8(vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))),
                       vmovn_s16(vcombine_s16(vmovn_s32(c), vmovn_s32(d))));
}

// The codes come in the order of the weight's: for nibbles those of even k, then those of odd k. A group that is not
// finite has codes of 0 and NaN for its scale.
template <bool kNibbles>
inline void quantise(const float* x, PackedGroup* packed) {
    float32x4_t most = vdupq_n_f32(0);
    for (int i = 0; i < kGroup; i += 4) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + i)));
    const float amax = vmaxvq_f32(most);  // NaN if any of them is
    const bool finite = amax <= 0x1.fffffep127f, tiny = amax < kTiny;
    const float factor = finite && !tiny ? 127.0f / amax : 0.0f;
    int32x4_t q[8];
    for (int i = 0; i < 8; ++i) {
        const int32x4_t rounded = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), factor));
        q[i] = finite ? rounded : vdupq_n_s32(0);
    }
    const int8x16_t low = narrow(q[0], q[1], q[2], q[3]), high = narrow(q[4], q[5], q[6], q[7]);
    vst1q_s8(packed->codes, kNibbles ? vuzp1q_s8(low, high) : low);
    vst1q_s8(packed->codes + 16, kNibbles ? vuzp2q_s8(low, high) : high);
    packed->scale = !finite ? __builtin_nanf("") : tiny ? 0.0f : amax / 127.0f;
    packed->sum = vaddlvq_s8(low) + vaddlvq_s8(high);
}

template <bool kNibbles>
void pack_int8(const float* x, int tokens, int64_t k, uint8_t* block) {
    PackedGroup* packed = reinterpret_cast<PackedGroup*>(block);
    for (int64_t group = 0; group < tokens * k / kGroup; ++group)
        quantise<kNibbles>(x + group * kGroup, packed + group);
}

enum class Kind { kInt8, kInt4, kMxfp4 };

struct Codes {
    int8x16_t low, high;
};

// A group of a row. Those of int4 are without their zero, those of mxfp4 twice the numbers.
template <Kind kKind>
inline Codes load_codes(const uint8_t* from) {
    if (kKind == Kind::kInt8) {
        const int8_t* codes = reinterpret_cast<const int8_t*>(from);
        return {vld1q_s8(codes), vld1q_s8(codes + 16)};
    }
    const uint8x16_t bytes = vld1q_u8(from);
    const uint8x16_t even = vandq_u8(bytes, vdupq_n_u8(15)), odd = vshrq_n_u8(bytes, 4);
    if (kKind == Kind::kInt4) return {vreinterpretq_s8_u8(even), vreinterpretq_s8_u8(odd)};
    static const int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int8x16_t table = vld1q_s8(kDoubled);
    return {vqtbl1q_s8(table, even), vqtbl1q_s8(table, odd)};
}

// Number `group` of the scales of four rows.
template <Kind kKind>
inline float32x4_t load_scales(const uint8_t* const (&rows)[kRowBlock], int64_t group) {
    if (kKind == Kind::kMxfp4) {
        uint32x4_t biased = vdupq_n_u32(0);
        biased = vsetq_lane_u32(rows[0][group], biased, 0);
        biased = vsetq_lane_u32(rows[1][group], biased, 1);
        biased = vsetq_lane_u32(rows[2][group], biased, 2);
        biased = vsetq_lane_u32(rows[3][group], biased, 3);
        // As exponents 0 and 255 the first is 2^-127 and the second NaN with the highest bit of the fraction set.
        const uint32x4_t special = vorrq_u32(vceqzq_u32(biased), vceqq_u32(biased, vdupq_n_u32(255)));
        const uint32x4_t fraction = vandq_u32(special, vdupq_n_u32(0x400000));
        return vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(biased, 23), fraction));
    }
    uint16x4_t bits = vdup_n_u16(0);
    bits = vld1_lane_u16(reinterpret_cast<const uint16_t*>(rows[0]) + group, bits, 0);
    bits = vld1_lane_u16(reinterpret_cast<const uint16_t*>(rows[1]) + group, bits, 1);
    bits = vld1_lane_u16(reinterpret_cast<const uint16_t*>(rows[2]) + group, bits, 2);
    bits = vld1_lane_u16(reinterpret_cast<const uint16_t*>(rows[3]) + group, bits, 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

inline int32x4_t load_zeros(const uint8_t* const (&rows)[kRowBlock], int64_t group) {
    int32x4_t zeros = vdupq_n_s32(rows[0][group]);
    zeros = vsetq_lane_s32(rows[1][group], zeros, 1);
    zeros = vsetq_lane_s32(rows[2][group], zeros, 2);
    return vsetq_lane_s32(rows[3][group], zeros, 3);
}

// The first `rows` of a vector to where they belong.
inline void store_rows(float* y, float32x4_t sums, int rows) {
    if (rows == kRowBlock) return vst1q_f32(y, sums);
    y[0] = vgetq_lane_f32(sums, 0);
    if (rows > 1) y[1] = vgetq_lane_f32(sums, 1);
    if (rows > 2) y[2] = vgetq_lane_f32(sums, 2);
}

namespace plain {

inline int32x4_t product(Codes w, Codes x) {
    // Two products of int8 fit into int16.
    const int16x8_t low =
        vmlal_s8(vmull_s8(vget_low_s8(w.low), vget_low_s8(x.low)), vget_low_s8(w.high), vget_low_s8(x.high));
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(w.low, x.low), w.high, x.high);
    return vpadalq_s16(vpaddlq_s16(low), high);
}

#include "quantized_neon.inl"

}  // namespace plain

MOERT_BEGIN_TARGET("arch=armv8.2-a+dotprod")

namespace dotprod {

inline int32x4_t product(Codes w, Codes x) {
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.low, x.low), w.high, x.high);
}

#include "quantized_neon.inl"

}  // namespace dotprod

MOERT_END_TARGET

// For fp8 x stays in fp32.
int64_t block_bytes_fp32(int64_t k) {
    return kTokenBlock * k * static_cast<int64_t>(sizeof(float));
}

void pack_fp32(const float* x, int tokens, int64_t k, uint8_t* block) {
    __builtin_memcpy(block, x, static_cast<size_t>(tokens * k) * sizeof(float));
}

constexpr float kFp8Step = 256;  // fp8 with its bits at the place of fp16's is the number divided by this

struct Eight {
    float32x4_t low, high;
};

inline Eight load_fp8(uint8x8_t codes) {
    const uint16x8_t wide = vreinterpretq_u16_s16(vshll_n_s8(vreinterpret_s8_u8(codes), 7));
    // The shift repeats the sign in the highest bit of fp16's exponent, which is set for NaN alone.
    const uint16x8_t size = vandq_u16(wide, vdupq_n_u16(0x3f80));
    const uint16x8_t nan = vceqq_u16(size, vdupq_n_u16(0x3f80));
    const uint16x8_t bits = vorrq_u16(vandq_u16(wide, vdupq_n_u16(0xbf80)), vandq_u16(nan, vdupq_n_u16(0x7e00)));
    return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(bits))), vcvt_high_f32_f16(vreinterpretq_f16_u16(bits))};
}

// One number in lane 0, the others 0.
inline float32x4_t load_fp8_one(const uint8_t* code) {
    return load_fp8(vset_lane_u8(*code, vdup_n_u8(0), 0)).low;
}

struct Fp8Product {
    static int64_t x_bytes(int64_t k) { return k * static_cast<int64_t>(sizeof(float)); }

    template <int kTokens>
    static void block(const Matrix& w, int64_t first, int rows, const uint8_t* packed, float* y, int64_t y_stride) {
        const int64_t scales = (w.k + kFp8Block - 1) / kFp8Block;
        const float* x = reinterpret_cast<const float*>(packed);
        const uint8_t* codes[kRowBlock];
        const float* row_scales[kRowBlock];
        for (int row = 0; row < kRowBlock; ++row) {
            const int64_t there = first + (row < rows ? row : rows - 1);
            codes[row] = w.data + there * w.k;
            row_scales[row] = reinterpret_cast<const float*>(w.scales) + there / kFp8Block * scales;
        }
        float32x4_t sums[kRowBlock][kTokens];
        for (int row = 0; row < kRowBlock; ++row)
            for (int token = 0; token < kTokens; ++token) sums[row][token] = vdupq_n_f32(0);
        for (int64_t scale = 0; scale < scales; ++scale) {
            float32x4_t parts[kRowBlock][kTokens];
            for (int row = 0; row < kRowBlock; ++row)
                for (int token = 0; token < kTokens; ++token) parts[row][token] = vdupq_n_f32(0);
            const int64_t end = scale + 1 < scales ? (scale + 1) * kFp8Block : w.k;
            int64_t i = scale * kFp8Block;
            for (; i + 8 <= end; i += 8) {
#pragma GCC unroll 4
                for (int row = 0; row < kRowBlock; ++row) {
                    __builtin_prefetch(codes[row] + i + kPrefetchBytes);
                    const Eight numbers = load_fp8(vld1_u8(codes[row] + i));
                    for (int token = 0; token < kTokens; ++token) {
                        const float* at = x + token * w.k + i;
                        parts[row][token] = vfmaq_f32(parts[row][token], numbers.low, vld1q_f32(at));
                        parts[row][token] = vfmaq_f32(parts[row][token], numbers.high, vld1q_f32(at + 4));
                    }
                }
            }
            for (; i < end; ++i) {
#pragma GCC unroll 4
                for (int row = 0; row < kRowBlock; ++row) {
                    const float32x4_t number = load_fp8_one(codes[row] + i);
                    for (int token = 0; token < kTokens; ++token) {
                        const float32x4_t value = vsetq_lane_f32(x[token * w.k + i], vdupq_n_f32(0), 0);
                        parts[row][token] = vfmaq_f32(parts[row][token], number, value);
                    }
                }
            }
            for (int row = 0; row < kRowBlock; ++row)
                for (int token = 0; token < kTokens; ++token)
                    sums[row][token] = vfmaq_n_f32(sums[row][token], parts[row][token], row_scales[row][scale]);
        }
        for (int token = 0; token < kTokens; ++token) {
            const float32x4_t sum =
                vpaddq_f32(vpaddq_f32(sums[0][token], sums[1][token]), vpaddq_f32(sums[2][token], sums[3][token]));
            store_rows(y + token * y_stride, vmulq_n_f32(sum, kFp8Step), rows);
        }
    }
};

template <class Product, int kTokens>
void some_tokens(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, float* y, int64_t y_stride) {
    for (int64_t row = begin; row < end; row += kRowBlock) {
        const int rows = static_cast<int>(end - row < kRowBlock ? end - row : kRowBlock);
        Product::template block<kTokens>(w, row, rows, packed, y + row - begin, y_stride);
    }
}

// Blocks are full but for the last, so tokens lie at one stride.
template <class Product>
void rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
          int64_t y_stride) {
    for (int64_t token = 0; token < tokens; token += kMostTokens) {
        const uint8_t* x = packed + token * Product::x_bytes(w.k);
        float* to = y + token * y_stride;
        switch (tokens - token) {
            case 1:
                return some_tokens<Product, 1>(w, begin, end, x, to, y_stride);
            case 2:
                return some_tokens<Product, 2>(w, begin, end, x, to, y_stride);
            case 3:
                return some_tokens<Product, 3>(w, begin, end, x, to, y_stride);
            default:
                some_tokens<Product, kMostTokens>(w, begin, end, x, to, y_stride);
        }
    }
}

const Kernel kFp8 = {"neon fp8", block_bytes_fp32, pack_fp32, rows<Fp8Product>};

template <Kind kKind, class Product>
constexpr Kernel int8_kernel(const char* name) {
    return Kernel{name, block_bytes_int8, pack_int8<kKind != Kind::kInt8>, rows<Product>};
}

// In the order of `Kind`.
const Kernel kPlain[] = {
    int8_kernel<Kind::kInt8, plain::Int8Product<Kind::kInt8>>("neon int8"),
    int8_kernel<Kind::kInt4, plain::Int8Product<Kind::kInt4>>("neon int4"),
    int8_kernel<Kind::kMxfp4, plain::Int8Product<Kind::kMxfp4>>("neon mxfp4"),
};
const Kernel kDotProd[] = {
    int8_kernel<Kind::kInt8, dotprod::Int8Product<Kind::kInt8>>("neon_dotprod int8"),
    int8_kernel<Kind::kInt4, dotprod::Int8Product<Kind::kInt4>>("neon_dotprod int4"),
    int8_kernel<Kind::kMxfp4, dotprod::Int8Product<Kind::kMxfp4>>("neon_dotprod mxfp4"),
};

bool has_dotprod() {
    constexpr unsigned long kAsimdDotProd = 1ul << 20;
    return (getauxval(AT_HWCAP) & kAsimdDotProd) != 0;
}

}  // namespace

const Kernel* quantized_neon(const Matrix& w, int64_t) {
    static const Kernel* const kernels = has_dotprod() ? kDotProd : kPlain;
    switch (w.format) {
        case Format::kFp8:
            return &kFp8;
        case Format::kInt8:
            return &kernels[static_cast<int>(Kind::kInt8)];
        case Format::kInt4:
            return &kernels[static_cast<int>(Kind::kInt4)];
        case Format::kMxfp4:
            return &kernels[static_cast<int>(Kind::kMxfp4)];
        default:
            return nullptr;
    }
}

}  // namespace moert

#endif
