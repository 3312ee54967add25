// One layer's step: the experts its tokens chose, from hidden states to their weighted sum.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matrix.h"
#include "pointwise.h"
#include "pool.h"

namespace moert {

// up: [2 width, hidden] if gated, else [width, hidden]; down: [hidden, width]. Biases may be null.
struct Expert {
    Matrix up, down;
    const uint8_t* up_bias = nullptr;
    const uint8_t* down_bias = nullptr;
};

// The tokens of one expert.
struct Group {
    Expert expert;
    int64_t tokens = 0;
    const int64_t* rows = nullptr;   // [tokens], rows of x and of out, each at most once; null: 0, 1, ...
    int64_t out_row = -1;            // its rows of out are this one and those after it, if not negative
    const float* weights = nullptr;  // [tokens]; null: 1
};

struct Step {
    Gate gate;
    Number number = Number::kFp32;  // of x and the biases; h is rounded to it
    int64_t hidden = 0, width = 0;
    const uint8_t* x = nullptr;  // [*, hidden]
    float* out = nullptr;        // [*, hidden]; what the experts give is added
    std::vector<Group> groups;
};

// For every group in their order, and each of its tokens: out[row] += weight * (down(h) + down_bias), where
// h = gate(up(x[row]) + up_bias). Products and gate are in fp32; h is rounded as activations are. The sum over the
// groups is made in fp32, in their order, with a rounding after each product and each sum, whoever computes which part.
// What `step` points to must stay until the work is done. Throws std::bad_alloc.
std::unique_ptr<Work> make_ffn(Step step);

// y [tokens, n] = x [tokens, k] w^T + bias, all of `number`; bias may be null.
struct Product {
    Matrix w;
    Number number = Number::kFp32;
    int64_t tokens = 0;
    const uint8_t* x = nullptr;
    const uint8_t* bias = nullptr;
    uint8_t* y = nullptr;
};

std::unique_ptr<Work> make_linear(const Product& product);

// Of the codes of a weight, without scales.
int64_t weight_bytes(const Matrix& w);

// As run(), for work that reads that many bytes of weights: on this thread alone, unless sharing it saves more than
// waking another one costs.
void run_reading(int64_t nbytes, Work& work);

}  // namespace moert
