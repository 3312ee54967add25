#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace moert {
namespace {

float exp_of(float x) {
    return static_cast<float>(std::exp(static_cast<double>(x)));
}

float sigmoid(float x) {
    return 1.0f / (1.0f + exp_of(-x));
}

bool is_better(float a, float b) {
    return std::isnan(a) ? !std::isnan(b) : a > b;
}

void softmax(const float* from, float* to, int64_t n) {
    float most = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t i = 0; i < n; ++i) most = is_better(from[i], most) ? from[i] : most;
    for (int64_t i = 0; i < n; ++i) {
        to[i] = exp_of(from[i] - most);
        sum += to[i];
    }
    for (int64_t i = 0; i < n; ++i) to[i] /= sum;
}

// The `count` best of n, in order; of equal ones those that torch.topk gives on the CPU, by the same steps of the same
// library: the hidden states that follow would be others.
void best_of(const float* values, int64_t n, int64_t count, int64_t* best) {
    using Scored = std::pair<float, int64_t>;
    std::vector<Scored> all(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) all[static_cast<size_t>(i)] = {values[i], i};
    const auto better = [](const Scored& a, const Scored& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    if (count * 64 <= n) {
        std::partial_sort(all.begin(), all.begin() + count, all.end(), better);
    } else {
        std::nth_element(all.begin(), all.begin() + count - 1, all.end(), better);
        std::sort(all.begin(), all.begin() + count - 1, better);
    }
    for (int64_t i = 0; i < count; ++i) best[i] = all[static_cast<size_t>(i)].second;
}

void keep_groups(const Router& of, std::vector<float>* choice) {
    const int64_t size = of.experts / of.groups;
    std::vector<float> worth(static_cast<size_t>(of.groups));
    std::vector<int64_t> best(2), kept(static_cast<size_t>(of.kept_groups));
    const int64_t of_group = std::min<int64_t>(size, of.by_two ? 2 : 1);
    for (int64_t group = 0; group < of.groups; ++group) {
        const float* values = choice->data() + group * size;
        best_of(values, size, of_group, best.data());
        float sum = 0;
        for (int64_t i = 0; i < of_group; ++i) sum += values[best[static_cast<size_t>(i)]];
        worth[static_cast<size_t>(group)] = sum;
    }
    best_of(worth.data(), of.groups, of.kept_groups, kept.data());
    for (int64_t group = 0; group < of.groups; ++group) {
        if (std::find(kept.begin(), kept.end(), group) != kept.end()) continue;
        std::fill_n(choice->data() + group * size, size, -std::numeric_limits<float>::infinity());
    }
}

}  // namespace

void pick(const Router& of, const float* logits, int64_t* ids, float* weights) {
    const size_t n = static_cast<size_t>(of.experts);
    std::vector<float> scores(logits, logits + n);
    if (of.scores == RouterScores::kSoftmax) softmax(logits, scores.data(), of.experts);
    if (of.scores == RouterScores::kSigmoid) std::transform(logits, logits + n, scores.begin(), sigmoid);
    std::vector<float> choice = scores;
    if (of.correction != nullptr)
        for (size_t i = 0; i < n; ++i) choice[i] += of.correction[i];
    if (of.kept_groups < of.groups) keep_groups(of, &choice);
    best_of(choice.data(), of.experts, of.top_k, ids);
    const float* from = of.weights == RouterWeights::kScores ? scores.data() : logits;
    for (int64_t i = 0; i < of.top_k; ++i) weights[i] = from[ids[i]];
    if (of.weights == RouterWeights::kSoftmax) {
        std::vector<float> picked(weights, weights + of.top_k);
        softmax(picked.data(), weights, of.top_k);
    } else if (of.weights == RouterWeights::kSigmoid) {
        std::transform(weights, weights + of.top_k, weights, sigmoid);
    }
    if (of.normalise) {
        const float sum = std::accumulate(weights, weights + of.top_k, 0.0f) + of.epsilon;
        for (int64_t i = 0; i < of.top_k; ++i) weights[i] /= sum;
    }
    for (int64_t i = 0; i < of.top_k; ++i) weights[i] *= of.scale;
    pointwise().round(weights, of.number, of.top_k);
}

}  // namespace moert
