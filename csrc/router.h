// Which experts one token's logits pick, and their weights.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "pointwise.h"

namespace moert {

enum class RouterScores : int { kSoftmax, kSigmoid, kLogits };
enum class RouterWeights : int { kScores, kSoftmax, kSigmoid };

constexpr int kRouterScores = 3;
constexpr int kRouterWeights = 3;

// What is compared, the score of each expert plus its correction, among the kept groups; and what the picks weigh: see
// RouterRule in Python.
struct Router {
    RouterScores scores = RouterScores::kSoftmax;
    RouterWeights weights = RouterWeights::kScores;
    int64_t experts = 0, top_k = 0;
    bool normalise = false;
    float epsilon = 0, scale = 1;
    int64_t groups = 1, kept_groups = 1;
    bool by_two = false;  // a group is as good as the sum of its best two, and not its best one
    float left_out = -std::numeric_limits<float>::infinity();  // the score of experts of other groups
    bool is_sorted = true;
    int64_t lanes = 1;                    // that torch adds at once, a power of two
    Number steps = Number::kFp32;         // what the result of every step is rounded to
    const uint8_t* correction = nullptr;  // [experts], or null
    Number correction_number = Number::kFp32;
    Number number = Number::kFp32;  // what weights are rounded to
};

// ids and weights [top_k], the best first, of equal ones those of torch.topk; NaN is better than anything. Not sorted,
// they come in the order in which torch.topk then gives them. Logits [experts]. Throws std::bad_alloc.
void pick(const Router& router, const float* logits, int64_t* ids, float* weights);

}  // namespace moert
