#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace moert {
namespace {

// Of the steps of the library that torch takes exponentials from where it computes softmax and sigmoid (SLEEF, expf
// with an error of 1.0 units in the last place): of others, picks that are nearly equal could be other ones.
float exp_of(float x) {
    if (std::isnan(x)) return x;
    if (x < -104.0f) return 0;
    if (x > 100.0f) return std::numeric_limits<float>::infinity();
    const float q = std::nearbyint(x * 1.442695040888963407359924681f);
    float s = std::fma(q, -0.693145751953125f, x);
    s = std::fma(q, -1.428606765330187045e-06f, s);
    float u = 0.000198527617612853646278381f;
    u = std::fma(u, s, 0.00139304355252534151077271f);
    u = std::fma(u, s, 0.00833336077630519866943359f);
    u = std::fma(u, s, 0.0416664853692054748535156f);
    u = std::fma(u, s, 0.166666671633720397949219f);
    u = std::fma(u, s, 0.5f);
    return std::ldexp(1.0f + std::fma(s * s, u, s), static_cast<int>(q));
}

// Torch takes what is left over by two of its vectors from the C library.
void sigmoid(const float* from, float* to, int64_t n, int64_t lanes) {
    const int64_t in_vectors = n / (2 * lanes) * (2 * lanes);
    for (int64_t i = 0; i < n; ++i) to[i] = 1.0f / (1.0f + (i < in_vectors ? exp_of(-from[i]) : std::exp(-from[i])));
}

bool is_better(float a, float b) {
    return std::isnan(a) ? !std::isnan(b) : a > b;
}

// Added in the order of a machine that adds so many at once.
float sum_of(const float* values, int64_t n, int64_t lanes) {
    if (n < lanes) return std::accumulate(values, values + n, 0.0f);
    std::vector<float> sums(values, values + lanes);
    for (int64_t i = lanes; i < n; ++i) sums[static_cast<size_t>(i % lanes)] += values[i];
    for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane)
            sums[static_cast<size_t>(lane)] += sums[static_cast<size_t>(lane + half)];
    return sums[0];
}

void softmax(const float* from, float* to, int64_t n, int64_t lanes) {
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n; ++i) most = is_better(from[i], most) ? from[i] : most;
    for (int64_t i = 0; i < n; ++i) to[i] = exp_of(from[i] - most);
    const float factor = 1 / sum_of(to, n, lanes);
    for (int64_t i = 0; i < n; ++i) to[i] *= factor;
}

// The `count` best of n, in order if sorted; of equal ones those that torch.topk gives on the CPU, by the same steps of
// the same library: the hidden states that follow would be others.
void best_of(const float* values, int64_t n, int64_t count, bool is_sorted, int64_t* best) {
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
        if (is_sorted) std::sort(all.begin(), all.begin() + count - 1, better);
    }
    for (int64_t i = 0; i < count; ++i) best[i] = all[static_cast<size_t>(i)].second;
}

void round_step(const Router& of, float* values, int64_t n) {
    if (of.steps != Number::kFp32) pointwise().round(values, of.steps, n);
}

// Whether what is compared is of the type of the steps: torch adds a finer correction in its own type.
bool is_choice_rounded(const Router& of) {
    return of.correction == nullptr || of.correction_number != Number::kFp32;
}

void keep_groups(const Router& of, std::vector<float>* choice) {
    const int64_t size = of.experts / of.groups;
    std::vector<float> worth(static_cast<size_t>(of.groups));
    std::vector<int64_t> best(2), kept(static_cast<size_t>(of.kept_groups));
    const int64_t of_group = std::min<int64_t>(size, of.by_two ? 2 : 1);
    for (int64_t group = 0; group < of.groups; ++group) {
        const float* values = choice->data() + group * size;
        best_of(values, size, of_group, true, best.data());
        float sum = 0;
        for (int64_t i = 0; i < of_group; ++i) sum += values[best[static_cast<size_t>(i)]];
        worth[static_cast<size_t>(group)] = sum;
    }
    if (is_choice_rounded(of)) round_step(of, worth.data(), of.groups);
    best_of(worth.data(), of.groups, of.kept_groups, false, kept.data());
    for (int64_t group = 0; group < of.groups; ++group) {
        if (std::find(kept.begin(), kept.end(), group) != kept.end()) continue;
        std::fill_n(choice->data() + group * size, size, of.left_out);
    }
}

}  // namespace

void pick(const Router& of, const float* logits, int64_t* ids, float* weights) {
    const size_t n = static_cast<size_t>(of.experts);
    std::vector<float> scores(logits, logits + n);
    if (of.scores == RouterScores::kSoftmax) softmax(logits, scores.data(), of.experts, of.lanes);
    if (of.scores == RouterScores::kSigmoid) sigmoid(logits, scores.data(), of.experts, of.lanes);
    round_step(of, scores.data(), of.experts);
    std::vector<float> choice = scores;
    if (of.correction != nullptr) {
        std::vector<float> correction(n);
        pointwise().widen(of.correction_number, of.correction, correction.data(), of.experts);
        pointwise().add(choice.data(), correction.data(), of.experts);
        if (is_choice_rounded(of)) round_step(of, choice.data(), of.experts);
    }
    if (of.kept_groups < of.groups) keep_groups(of, &choice);
    best_of(choice.data(), of.experts, of.top_k, of.is_sorted, ids);
    const float* from = of.weights == RouterWeights::kScores ? scores.data() : logits;
    for (int64_t i = 0; i < of.top_k; ++i) weights[i] = from[ids[i]];
    if (of.weights == RouterWeights::kSoftmax) {
        std::vector<float> picked(weights, weights + of.top_k);
        softmax(picked.data(), weights, of.top_k, of.lanes);
    } else if (of.weights == RouterWeights::kSigmoid) {
        sigmoid(weights, weights, of.top_k, of.lanes);
    }
    round_step(of, weights, of.top_k);
    if (of.normalise) {
        float sum = std::accumulate(weights, weights + of.top_k, 0.0f);
        round_step(of, &sum, 1);
        sum += of.epsilon;
        round_step(of, &sum, 1);
        for (int64_t i = 0; i < of.top_k; ++i) weights[i] /= sum;
        round_step(of, weights, of.top_k);
    }
    for (int64_t i = 0; i < of.top_k; ++i) weights[i] *= of.scale;
    pointwise().round(weights, of.number, of.top_k);
}

}  // namespace moert
