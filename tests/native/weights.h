// Weights in every format beside the numbers they mean, which are worked out in double from the formats' definitions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "matrix.h"

using moert::Format;
using moert::kFp8Block;
using moert::Matrix;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
    int between(int low, int high) { return low + below(high - low + 1); }
    // In (-1, 1), with all of fp32's fraction in use.
    float signed_unit() { return static_cast<float>(static_cast<int64_t>(next() >> 11) * 0x1p-52 - 1.0); }

  private:
    uint64_t state_;
};

// A number of sign, exponent and fraction bits, of which the highest exponent is infinity or NaN if `ieee`.
inline double decode(uint32_t bits, int exponent_bits, int fraction_bits, bool ieee) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
    const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
    const double sign = (bits >> (exponent_bits + fraction_bits)) & 1 ? -1 : 1;
    if (ieee && exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * kInf : kNan;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
    return sign * std::ldexp((1u << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

inline double decode_fp16(uint32_t bits) {
    return decode(bits, 5, 10, true);
}

inline double decode_fp8(uint32_t bits) {
    return (bits & 0x7f) == 0x7f ? kNan : decode(bits, 4, 3, false);
}

inline double decode_e2m1(uint32_t bits) {
    return decode(bits, 2, 1, false);
}

inline double decode_e8m0(uint32_t bits) {
    return bits == 255 ? kNan : std::ldexp(1.0, static_cast<int>(bits) - 127);
}

struct Variant {
    Format format;
    bool transposed = false;
    int group = 0;
    bool zeros = false;

    // x in int8: all but these quantised formats.
    bool is_quantised() const { return format >= Format::kInt8; }
    size_t element_bytes() const {
        return format == Format::kFp32 ? 4 : format == Format::kBf16 || format == Format::kFp16 ? 2 : 1;
    }
    size_t scale_bytes() const { return format == Format::kFp8 ? 4 : format == Format::kMxfp4 ? 1 : 2; }
    std::string name() const {
        static const char* const kNames[moert::kFormats] = {"fp32", "bf16", "fp16", "fp8", "int8", "int4", "mxfp4"};
        std::string name = kNames[static_cast<int>(format)];
        if (format == Format::kInt4) name += " of " + std::to_string(group);
        return name + (transposed ? ", transposed" : "") + (zeros ? ", zeros" : "");
    }
};

// Fields as they are stored; `numbers` must be called after any of them changed.
struct Weight {
    Variant variant;
    int64_t n, k;
    std::vector<uint32_t> codes;   // [n, k], whatever the layout in memory
    std::vector<uint32_t> scales;  // bits
    std::vector<uint32_t> zeros;

    Weight(Variant variant, int64_t n, int64_t k) : variant(variant), n(n), k(k), codes(n * k) {
        if (variant.group == 0) return;
        scales.resize(scale_rows() * scale_columns());
        if (variant.zeros) zeros.resize(scales.size());
    }

    int64_t scale_rows() const { return variant.format == Format::kFp8 ? (n + kFp8Block - 1) / kFp8Block : n; }
    int64_t scale_columns() const { return (k + variant.group - 1) / variant.group; }
    size_t scale_at(int64_t row, int64_t column) const {
        const int64_t scale_row = variant.format == Format::kFp8 ? row / kFp8Block : row;
        return static_cast<size_t>(scale_row * scale_columns() + column / variant.group);
    }

    double number(int64_t row, int64_t column) const {
        const uint32_t code = codes[row * k + column];
        const size_t at = variant.group == 0 ? 0 : scale_at(row, column);
        switch (variant.format) {
            case Format::kFp32: {
                float value;
                std::memcpy(&value, &code, sizeof value);
                return value;
            }
            case Format::kBf16:
                return decode(code, 8, 7, true);
            case Format::kFp16:
                return decode_fp16(code);
            case Format::kFp8: {
                float scale;
                std::memcpy(&scale, &scales[at], sizeof scale);
                return decode_fp8(code) * static_cast<double>(scale);
            }
            case Format::kInt8:
                return static_cast<int8_t>(code) * decode_fp16(scales[at]);
            case Format::kInt4:
                return (static_cast<int>(code) - (variant.zeros ? static_cast<int>(zeros[at]) : 8)) *
                       decode_fp16(scales[at]);
            case Format::kMxfp4:
                return decode_e2m1(code) * decode_e8m0(scales[at]);
        }
        return kNan;
    }

    std::vector<uint8_t> data_bytes() const {
        std::vector<uint8_t> bytes;
        const size_t element = variant.element_bytes();
        if (variant.format == Format::kInt4 || variant.format == Format::kMxfp4) {
            for (size_t i = 0; i < codes.size(); i += 2)
                bytes.push_back(static_cast<uint8_t>(codes[i] | (codes[i + 1] << 4)));
            return bytes;
        }
        for (int64_t outer = 0; outer < (variant.transposed ? k : n); ++outer)
            for (int64_t inner = 0; inner < (variant.transposed ? n : k); ++inner)
                append(variant.transposed ? codes[inner * k + outer] : codes[outer * k + inner], element, &bytes);
        return bytes;
    }
    std::vector<uint8_t> scale_bytes() const {
        std::vector<uint8_t> bytes;
        for (uint32_t scale : scales) append(scale, variant.scale_bytes(), &bytes);
        return bytes;
    }
    std::vector<uint8_t> zero_bytes() const { return std::vector<uint8_t>(zeros.begin(), zeros.end()); }

  private:
    static void append(uint32_t value, size_t nbytes, std::vector<uint8_t>* bytes) {
        for (size_t i = 0; i < nbytes; ++i) bytes->push_back(static_cast<uint8_t>(value >> (8 * i)));
    }
};

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Finite weights of all the codes that a format has, with exponents not too far apart where it has many.
inline Weight random_weight(Variant variant, int64_t n, int64_t k, Random& random) {
    Weight weight(variant, n, k);
    for (uint32_t& code : weight.codes) {
        const uint32_t bits = static_cast<uint32_t>(random.next());
        switch (variant.format) {
            case Format::kFp32:
                code = float_bits(random.signed_unit());
                break;
            case Format::kBf16:
                code = (bits & 0x807f) | static_cast<uint32_t>(random.between(119, 127)) << 7;
                break;
            case Format::kFp16:
                code = (bits & 0x83ff) | static_cast<uint32_t>(random.between(0, 15)) << 10;
                break;
            case Format::kFp8:
                code = (bits & 0x7f) == 0x7f ? 0 : bits & 0xff;
                break;
            case Format::kInt8:
                code = (bits & 0xff) == 0x80 ? 0 : bits & 0xff;
                break;
            default:
                code = bits & 0xf;
        }
    }
    for (uint32_t& scale : weight.scales) {
        const uint32_t bits = static_cast<uint32_t>(random.next());
        if (variant.format == Format::kFp8)
            scale = float_bits(0.001f + std::fabs(random.signed_unit()));
        else if (variant.format == Format::kMxfp4)
            scale = static_cast<uint32_t>(random.between(118, 128));
        else
            scale = (bits & 0x83ff) | static_cast<uint32_t>(random.between(4, 14)) << 10;
    }
    for (uint32_t& zero : weight.zeros) zero = static_cast<uint32_t>(random.below(16));
    return weight;
}
