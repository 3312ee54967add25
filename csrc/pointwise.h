// What happens to numbers one by one between the products: conversions, gates, sums over experts.
#pragma once

#include <cstdint>

#include "heads.h"

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

// What a mask says of a token: nothing, whether it counts (bytes), or what is added to its score (of the other type).
enum class Mask : int { kNone, kChosen, kAdded };

constexpr int kMasks = 3;

// The attention of one query token: softmax over the tokens of q . k * scale + mask, times v.
struct Attention {
    Number number = Number::kFp32;  // of q, k, v, y and an added mask
    int64_t batch = 0, heads = 0, kv_heads = 0, tokens = 0;
    int64_t width = 0, value_width = 0;  // at most kMostHeadWidth
    float scale = 1;
    Heads q = {}, k = {}, v = {};  // q has one token
    Mask mask_kind = Mask::kNone;
    Heads mask = {};       // [batch, heads, tokens] with a number at each token
    uint8_t* y = nullptr;  // [batch, heads, value_width], contiguous
};

constexpr int64_t kMostHeadWidth = 512;
constexpr int64_t kChunkTokens = 256;
constexpr int64_t kHeadsAtOnce = 8;

// What some tokens contribute to one query head, in kShareHead + value_width floats: the highest score, the sum of
// exp(score - highest), and the sum of v weighted with that.
constexpr int64_t kShareHead = 2;

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
    // The sum of w[i] * x[i], of every sixteenth product apart and then of those.
    float (*dot)(Number number, const uint8_t* w, const float* x, int64_t n);
    // One row of `width` numbers; y may not be x. The squares are summed in double precision.
    void (*normalise)(const Norm& norm, const uint8_t* x, uint8_t* y);
    // y = round(round(x * cos) + round(half-turned x * sin)) over n numbers, where half-turned x is minus its second
    // half and then its first; y may not be x. Needs n <= kMostTurned.
    void (*turn)(Number number, const uint8_t* x, const float* cos, const float* sin, uint8_t* y, int64_t n);
    // What `n` <= kChunkTokens tokens from `begin` on contribute to `count` <= kHeadsAtOnce query heads from `head` on,
    // which have the heads of k and v in common. One share after the other.
    void (*attend)(const Attention& of, int64_t batch, int64_t head, int64_t count, int64_t begin, int64_t n,
                   float* shares);
    // y of one query head from the shares of all tokens, `step` floats apart.
    void (*merge)(const Attention& of, const float* shares, int64_t count, int64_t step, uint8_t* y);
};

extern const Pointwise kPointwiseScalar;
#if defined(__x86_64__)
extern const Pointwise kPointwiseAvx2;
extern const Pointwise kPointwiseAvx512;
#endif

// Of the instruction set in use.
const Pointwise& pointwise();

}  // namespace moert
