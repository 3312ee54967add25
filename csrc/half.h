// 16-bit floating point, one number at a time and without any instruction set's help.
#pragma once

#include <cstdint>
#include <cstring>

namespace moert {

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_to_float(uint16_t bits) {
    return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float fp16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 0x1f, fraction = half & 0x3ff;
    if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
    return bits_to_float(sign | float_to_bits(static_cast<float>(fraction) * 0x1p-24f));
}

// Rounds to nearest, ties to even; too large becomes infinity; NaN stays NaN.
static inline uint16_t float_to_fp16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x38800000u) {
        // Adding 2^-1 * 2^-14 * 2 aligns the last kept bit of a subnormal with the last bit of the sum.
        const float aligned = bits_to_float(size) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000u));
    }
    const uint32_t odd = (size >> 13) & 1;
    return static_cast<uint16_t>(sign | ((size + 0xfffu + odd - 0x38000000u) >> 13));
}

}  // namespace moert
