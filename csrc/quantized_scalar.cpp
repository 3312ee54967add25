// Quantised weights in plain C++: the meaning that the other instruction sets must match, and the fall-back.
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernel.h"

namespace moert {
namespace {

constexpr int kGroup = 32;          // numbers of x that share a scale
constexpr float kTiny = 0x1p-119f;  // groups of x below are taken for zeros: their scale would be subnormal

// A token of packed x: k fp32 numbers for fp8, else k int8 codes and the k/32 fp32 scales of their groups.
int64_t round_up(int64_t nbytes) {
    return (nbytes + 63) / 64 * 64;
}

int64_t float_bytes(int64_t k) {
    return round_up(k * 4);
}

int64_t float_block_bytes(int64_t k) {
    return kTokenBlock * float_bytes(k);
}

void pack_floats(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int token = 0; token < tokens; ++token)
        std::memcpy(block + token * float_bytes(k), x + token * k, static_cast<size_t>(k) * sizeof(float));
}

int64_t code_bytes(int64_t k) {
    return round_up(k + k / kGroup * 4);
}

int64_t code_block_bytes(int64_t k) {
    return kTokenBlock * code_bytes(k);
}

float quantise(const float* x, int8_t* codes) {
    uint32_t most = 0;
    for (int i = 0; i < kGroup; ++i) {
        const uint32_t size = float_to_bits(x[i]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    const float amax = bits_to_float(most);
    const bool finite = most < 0x7f800000u;
    if (!finite || amax < kTiny) {
        std::memset(codes, 0, kGroup);
        return finite ? 0.0f : bits_to_float(0x7fc00000u);
    }
    const float factor = 127.0f / amax;
    for (int i = 0; i < kGroup; ++i) codes[i] = static_cast<int8_t>(std::nearbyint(x[i] * factor));
    return amax / 127.0f;
}

void pack_codes(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int token = 0; token < tokens; ++token) {
        uint8_t* to = block + token * code_bytes(k);
        for (int64_t i = 0; i < k; i += kGroup) {
            const float scale = quantise(x + token * k + i, reinterpret_cast<int8_t*>(to + i));
            std::memcpy(to + k + i / kGroup * 4, &scale, sizeof scale);
        }
    }
}

float e4m3_to_float(uint8_t code) {
    const int exponent = (code >> 3) & 15, fraction = code & 7;
    if ((code & 0x7f) == 0x7f) return bits_to_float(0x7fc00000u);
    const float size = exponent == 0 ? static_cast<float>(fraction) * 0x1p-9f
                                     : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
    return code & 0x80 ? -size : size;
}

float e8m0_to_float(uint8_t code) {
    return bits_to_float(code == 0 ? 0x00400000u : code == 255 ? 0x7fc00000u : static_cast<uint32_t>(code) << 23);
}

void rows_fp8(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
              int64_t y_stride) {
    const int64_t blocks = (w.k + kFp8Block - 1) / kFp8Block;
    float values[256];
    for (int code = 0; code < 256; ++code) values[code] = e4m3_to_float(static_cast<uint8_t>(code));
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* codes = w.data + row * w.k;
        const uint8_t* scales = w.scales + row / kFp8Block * blocks * 4;
        for (int64_t token = 0; token < tokens; ++token) {
            const float* x = reinterpret_cast<const float*>(packed + token * float_bytes(w.k));
            float sum = 0;
            for (int64_t block = 0; block < blocks; ++block) {
                float scale, part = 0;
                std::memcpy(&scale, scales + block * 4, sizeof scale);
                const int64_t stop = w.k < (block + 1) * kFp8Block ? w.k : (block + 1) * kFp8Block;
                for (int64_t i = block * kFp8Block; i < stop; ++i) part += values[codes[i]] * x[i];
                sum += part * scale;
            }
            y[token * y_stride + row - begin] = sum;
        }
    }
}

// The codes of a group, less their zero; for e2m1 twice the value.
void read_group(const Matrix& w, int64_t row, int64_t first, int8_t* codes) {
    static const int8_t kE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    if (w.format == Format::kInt8) {
        std::memcpy(codes, w.data + row * w.k + first, kGroup);
        return;
    }
    const uint8_t* from = w.data + (row * w.k + first) / 2;
    const int zero = w.zeros == nullptr ? 8 : w.zeros[row * (w.k / w.group) + first / w.group];
    for (int i = 0; i < kGroup; ++i) {
        const int code = from[i / 2] >> (i % 2 * 4) & 15;
        codes[i] = w.format == Format::kMxfp4 ? kE2m1[code] : static_cast<int8_t>(code - zero);
    }
}

float read_scale(const Matrix& w, int64_t row, int64_t first) {
    const int64_t index = row * (w.k / w.group) + first / w.group;
    if (w.format == Format::kMxfp4) return e8m0_to_float(w.scales[index]);
    uint16_t half;
    std::memcpy(&half, w.scales + 2 * index, sizeof half);
    return fp16_to_float(half);
}

void rows_codes(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                int64_t y_stride) {
    const float factor = w.format == Format::kMxfp4 ? 0.5f : 1.0f;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t token = 0; token < tokens; ++token) y[token * y_stride + row - begin] = 0;
        for (int64_t first = 0; first < w.k; first += kGroup) {
            int8_t codes[kGroup];
            read_group(w, row, first, codes);
            const float scale = read_scale(w, row, first);
            for (int64_t token = 0; token < tokens; ++token) {
                const uint8_t* x = packed + token * code_bytes(w.k);
                float x_scale;
                std::memcpy(&x_scale, x + w.k + first / kGroup * 4, sizeof x_scale);
                int dot = 0;
                for (int i = 0; i < kGroup; ++i) dot += codes[i] * reinterpret_cast<const int8_t*>(x)[first + i];
                y[token * y_stride + row - begin] += static_cast<float>(dot) * (scale * x_scale);
            }
        }
        for (int64_t token = 0; token < tokens; ++token) y[token * y_stride + row - begin] *= factor;
    }
}

const Kernel kFp8 = {"scalar fp8", float_block_bytes, pack_floats, rows_fp8};
const Kernel kCodes = {"scalar int8, int4 and mxfp4", code_block_bytes, pack_codes, rows_codes};

}  // namespace

const Kernel* quantized_scalar(const Matrix& w, int64_t) {
    switch (w.format) {
        case Format::kFp8:
            return &kFp8;
        case Format::kInt8:
        case Format::kInt4:
        case Format::kMxfp4:
            return &kCodes;
        default:
            return nullptr;
    }
}

}  // namespace moert
