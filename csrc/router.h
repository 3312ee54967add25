// Which experts one token's logits pick, and their weights.
#pragma once

#include <cstdint>
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
    bool by_two = false;                // a group is as good as the sum of its best two, and not its best one
    const float* correction = nullptr;  // [experts], or null
    Number number = Number::kFp32;      // what weights are rounded to
};

// ids and weights [top_k], the best first, of equal ones those of torch.topk; NaN is better than anything. Logits
// [experts]. Throws std::bad_alloc.
void pick(const Router& router, const float* logits, int64_t* ids, float* weights);

}  // namespace moert
