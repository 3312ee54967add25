// A router asked about the hidden state of one token before it is there: what is known of it goes through a line for
// each channel, which is learned.
#pragma once

#include <cstdint>
#include <vector>

#include "pointwise.h"

namespace moert {

// y = offset + gain * x of each of `width` channels. Both may be null: y = x.
struct Lines {
    const float* gain = nullptr;
    const float* offset = nullptr;
};

struct LookedAt {
    Number number = Number::kFp32;  // of the weight
    int64_t experts = 0, width = 0;
    const uint8_t* weight = nullptr;    // [experts, width]
    const float* bias = nullptr;        // [experts] or null: added to the products
    const float* correction = nullptr;  // [experts] or null: added to the sigmoid of those
};

// x [width] over the root of its mean square plus eps, where eps is not negative; x may be y.
void scale_to_one(const float* x, float eps, float* y, int64_t width);

// What the router compares, [experts], of the token that x [width] becomes.
void look(const LookedAt& router, const Lines& lines, const float* x, float* values);

// The `count` highest of n values, the best first, of equal ones the first; empty if one of all is NaN, or the best of
// them infinite.
std::vector<int64_t> best_first(const float* values, int64_t n, int64_t count);

// Moves what is known of each channel by `share` towards x having become y, and draws the line anew; see
// gate_ahead_corrected in Python. means and moments are [2, width]: of x and y, and how x varies, alone and with y.
// `moments_too` says whether the moments move. False, and nothing has changed, if x or y is not finite.
bool learn_lines(const float* x, const float* y, int64_t width, float share, bool moments_too, float* means,
                 float* moments, float* gain, float* offset);

}  // namespace moert
