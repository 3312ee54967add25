// What happens to numbers one by one between the products: conversions, gates, sums over experts.
#pragma once

#include <cstdint>

namespace moert {

// The type of activations and biases in memory.
enum class Number : int { kFp32, kBf16, kFp16 };

constexpr int64_t bytes_of(Number number) {
    return number == Number::kFp32 ? 4 : 2;
}

enum class Curve : int { kIdentity, kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid, kTanh };

constexpr int kCurves = 8;

// Gated, with g and u the two halves of the up product, or its even and odd numbers if interleaved:
//   h = min(curve(min(g, gate_limit)), output_limit) * (clamp(u, -up_limit, up_limit) + up_offset)
// else h = min(curve(x), output_limit). kSilu is x * sigmoid(alpha * x). As in torch, NaN passes every limit.
struct Gate {
    Curve curve = Curve::kIdentity;
    bool gated = false, interleaved = false;
    float alpha = 1, gate_limit = 0, up_limit = 0, up_offset = 0, output_limit = 0;
};

// Where a norm's weight comes in:
//   kAfterRounding   y = round(w * round(x * r))
//   kBeforeRounding  y = round(w * (x * r))
//   kOnePlus         y = round((1 + w) * (x * r))
// with r = 1 / sqrt(mean(x^2) + eps), where round is to the type of x.
enum class Scale : int { kAfterRounding, kBeforeRounding, kOnePlus };

constexpr int kScales = 3;

struct Norm {
    Scale scale = Scale::kAfterRounding;
    Number number = Number::kFp32;  // of x, y and the weight
    float eps = 0;
    int64_t width = 0;
    const uint8_t* weight = nullptr;
};

constexpr int64_t kMostTurned = 1024;

// All in fp32 with a rounding after each operation, so every instruction set gives the same bits, but for the curves of
// the C library (kGelu, kTanh), which are the same code everywhere.
struct Pointwise {
    void (*widen)(Number from_number, const uint8_t* from, float* to, int64_t n);
    void (*narrow)(const float* from, Number to_number, uint8_t* to, int64_t n);
    // Rounds to the numbers of a type.
    void (*round)(float* values, Number number, int64_t n);
    // h[i] from g[i * step] and, if gated, u[i * step].
    void (*gate)(const Gate& gate, const float* g, const float* u, int64_t step, float* h, int64_t n);
    void (*add)(float* to, const float* from, int64_t n);
    // to += from * weight
    void (*add_weighted)(float* to, const float* from, float weight, int64_t n);
    // One row of `width` numbers; y may not be x. The squares are summed in double precision.
    void (*normalise)(const Norm& norm, const uint8_t* x, uint8_t* y);
    // y = round(round(x * cos) + round(half-turned x * sin)) over n numbers, where half-turned x is minus its second
    // half and then its first; y may not be x. Needs n <= kMostTurned.
    void (*turn)(Number number, const uint8_t* x, const float* cos, const float* sin, uint8_t* y, int64_t n);
};

extern const Pointwise kPointwiseScalar;
#if defined(__x86_64__)
extern const Pointwise kPointwiseAvx2;
extern const Pointwise kPointwiseAvx512;
#endif

// Of the instruction set in use.
const Pointwise& pointwise();

}  // namespace moert
