#include "half.h"
#include "pointwise.h"

namespace moert {
namespace {

void widen_fp16(const uint8_t* from, float* to, int64_t n) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(halves[i]);
}

void narrow_fp16(const float* from, uint8_t* to, int64_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) halves[i] = float_to_fp16(from[i]);
}

#include "pointwise.inl"

#include "norm.inl"

#include "rotary.inl"

inline float multiply_add(float a, float b, float c) {
    return a * b + c;
}

constexpr int64_t kHeadsTogether = 1;

#include "attention.inl"

}  // namespace

const Pointwise kPointwiseScalar = {widen, narrow,    round_numbers, gate_numbers, add,  add_weighted,
                                    dot,   normalise, turn,          attend,       merge};

}  // namespace moert
