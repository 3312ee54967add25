#include "token_layer.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "foresight.h"

namespace moert {
namespace {

void run_shared(Work& work, int64_t nbytes) {
    if (nbytes >= kWorthSharing) return run(work);
    for (int phase = 0; phase < work.phases(); ++phase)
        for (int64_t task = 0; task < work.tasks(phase); ++task) work.run(phase, task);
}

void route(const TokenLayer& layer, LayerToken* token) {
    const Number number = layer.attention.number;
    const size_t experts = static_cast<size_t>(layer.rule.experts);
    std::vector<float> logits(experts);
    const Product product{layer.router.w, number, 1, token->attended.normed, layer.router.bias, token->logits};
    const int64_t nbytes = weight_bytes(product.w);
    note_reading(product.w.data, nbytes);
    run_shared(*make_linear(product), nbytes);
    pointwise().widen(number, token->logits, logits.data(), layer.rule.experts);
    pick(layer.rule, logits.data(), token->ids, token->weights);
}

bool can_compute(const TokenLayer& layer, const LayerToken& token) {
    if (token.experts == nullptr) return false;
    for (int64_t i = 0; i < layer.rule.top_k; ++i)
        if (token.ids[i] >= static_cast<int64_t>(token.experts->experts.size()) || token.weights[i] == 0) return false;
    return true;
}

void compute(const TokenLayer& layer, LayerToken* token) {
    const auto begin = std::chrono::steady_clock::now();
    note_reading(&layer, 0);
    const int64_t hidden = layer.attention.hidden;
    const Number number = layer.attention.number;
    const size_t n = static_cast<size_t>(hidden);
    std::vector<float> sums(n), h(n);
    std::vector<int64_t> places(static_cast<size_t>(layer.rule.top_k));
    std::iota(places.begin(), places.end(), int64_t{0});
    std::sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return token->ids[a] < token->ids[b]; });
    Step step;
    step.gate = layer.gate;
    step.number = number;
    step.hidden = hidden;
    step.width = layer.width;
    step.x = token->attended.normed;
    step.out = sums.data();
    int64_t nbytes = 0;
    for (const int64_t place : places) {
        Group group;
        group.expert = token->experts->experts[static_cast<size_t>(token->ids[place])];
        group.tokens = 1;
        group.weights = token->weights + place;
        nbytes += weight_bytes(group.expert.up) + weight_bytes(group.expert.down);
        step.groups.push_back(group);
    }
    run_shared(*make_ffn(std::move(step)), nbytes);
    const Pointwise& each = pointwise();
    each.round(sums.data(), number, hidden);
    each.widen(number, token->attended.y, h.data(), hidden);
    each.add(h.data(), sums.data(), hidden);
    each.narrow(h.data(), number, token->y, hidden);
    token->experts_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

void run_layer(const TokenLayer& layer, LayerToken* token) {
    attend_token(layer.attention, token->attended);
    route(layer, token);
    if (can_compute(layer, *token)) compute(layer, token);
}

}  // namespace moert
