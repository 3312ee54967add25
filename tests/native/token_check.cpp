// One token through whole layers and blocks, against the products, norms and attentions that they are made of, one by
// one, and from several threads at once. Prints a line for each instruction set;
// exits with 1 if one bit is another.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "half.h"
#include "isa.h"
#include "norm.h"
#include "rotary.h"
#include "token_layer.h"

using namespace moert;

namespace {

constexpr int64_t kHidden = 256, kHeads = 8, kKvHeads = 2, kHeadWidth = 32, kTurned = 16, kPast = 300;
constexpr int64_t kExperts = 16, kTopK = 4, kWidth = 96, kSharedWidth = 160;

std::mt19937 generator(7);

using Halves = std::vector<uint16_t>;

Halves halves(int64_t n, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    Halves made(static_cast<size_t>(n));
    for (uint16_t& number : made) number = float_to_bf16(static_cast<float>(normal(generator)));
    return made;
}

uint8_t* bytes(Halves& numbers) {
    return reinterpret_cast<uint8_t*>(numbers.data());
}

Matrix matrix(Halves& numbers, int64_t n, int64_t k) {
    Matrix made;
    made.format = Format::kBf16;
    made.n = n;
    made.k = k;
    made.data = bytes(numbers);
    return made;
}

// All that a layer has, with room to call it from several threads.
struct Model {
    Halves q = halves(kHeads * kHeadWidth * kHidden, 0.06), k = halves(kKvHeads * kHeadWidth * kHidden, 0.06),
           v = halves(kKvHeads * kHeadWidth * kHidden, 0.06), o = halves(kHidden * kHeads * kHeadWidth, 0.06),
           k_bias = halves(kKvHeads * kHeadWidth), q_norm = halves(kHeadWidth), before = halves(kHidden),
           after = halves(kHidden), router = halves(kExperts * kHidden, 0.06),
           gate = halves(kSharedWidth * kHidden, 0.06), up = halves(kSharedWidth * kHidden, 0.06),
           down = halves(kHidden * kSharedWidth, 0.06), share = halves(kHidden, 0.06), curve, expert_up, expert_down;
    std::vector<float> correction, fine_router;
    ExpertTable table;
    TokenLayer layer;

    Model(bool is_fine) {
        for (int32_t bits = 0; bits < 1 << 16; ++bits)
            curve.push_back(float_to_bf16(std::tanh(bf16_to_float(static_cast<uint16_t>(bits)))));
        SelfAttention& attention = layer.attention;
        attention.number = Number::kBf16;
        attention.hidden = kHidden;
        attention.heads = kHeads;
        attention.kv_heads = kKvHeads;
        attention.width = kHeadWidth;
        attention.scale = 0.2f;
        attention.q.w = matrix(q, kHeads * kHeadWidth, kHidden);
        attention.k = {matrix(k, kKvHeads * kHeadWidth, kHidden), bytes(k_bias)};
        attention.v.w = matrix(v, kKvHeads * kHeadWidth, kHidden);
        attention.o.w = matrix(o, kHidden, kHeads * kHeadWidth);
        attention.q_norm = norm(q_norm, kHeadWidth);
        attention.before = norm(before, kHidden);
        attention.after = norm(after, kHidden);
        MoeBlock& block = layer.block;
        block.number = Number::kBf16;
        block.hidden = kHidden;
        block.router.w = matrix(router, kExperts, kHidden);
        block.logits = is_fine ? Number::kFp32 : Number::kBf16;
        block.width = kWidth;
        block.scale = 1.5f;
        block.gate.curve = Curve::kSilu;
        block.gate.gated = true;
        block.gate.gate_limit = block.gate.up_limit = block.gate.output_limit = INFINITY;
        block.shared.gate.w = matrix(gate, kSharedWidth, kHidden);
        block.shared.up.w = matrix(up, kSharedWidth, kHidden);
        block.shared.down.w = matrix(down, kHidden, kSharedWidth);
        block.shared.share.w = matrix(share, 1, kHidden);
        block.shared.curve = block.shared.up_curve = block.shared.share_curve = curve.data();
        correction.assign(kExperts, 0);
        for (int64_t i = 0; i < kExperts; ++i) correction[static_cast<size_t>(i)] = 0.01f * static_cast<float>(i);
        Router& rule = block.rule;
        rule.scores = RouterScores::kSigmoid;
        rule.experts = kExperts;
        rule.top_k = kTopK;
        rule.normalise = rule.by_two = true;
        rule.groups = 4;
        rule.kept_groups = 2;
        rule.is_sorted = false;
        rule.lanes = 8;
        rule.correction = reinterpret_cast<const uint8_t*>(correction.data());
        for (const uint16_t number : router) fine_router.push_back(bf16_to_float(number));
        expert_up = halves(kExperts * 2 * kWidth * kHidden, 0.06);
        expert_down = halves(kExperts * kHidden * kWidth, 0.06);
        table.hidden = kHidden;
        table.width = kWidth;
        table.gated = true;
        for (int64_t i = 0; i < kExperts; ++i) {
            Expert expert;
            expert.up = matrix(expert_up, 2 * kWidth, kHidden);
            expert.up.data += i * 4 * kWidth * kHidden;
            expert.down = matrix(expert_down, kHidden, kWidth);
            expert.down.data += i * 2 * kHidden * kWidth;
            table.experts.push_back(expert);
        }
    }

    static Norm norm(Halves& weight, int64_t width) {
        Norm made;
        made.number = Number::kBf16;
        made.eps = 1e-6f;
        made.width = width;
        made.weight = bytes(weight);
        return made;
    }
};

// What a token is given, and what becomes of it.
struct Case {
    Halves x, cos, sin, keys, values, h, normed, shared, y;
    std::vector<int64_t> ids = std::vector<int64_t>(kTopK);
    std::vector<float> weights = std::vector<float>(kTopK), logits = std::vector<float>(kExperts);
    LayerToken token;

    explicit Case(unsigned seed) {
        generator.seed(seed);
        x = halves(kHidden);
        cos = halves(kTurned);
        sin = halves(kTurned);
        keys = halves(kKvHeads * (kPast + 1) * kHeadWidth);
        values = halves(kKvHeads * (kPast + 1) * kHeadWidth);
        h = normed = shared = y = Halves(kHidden);
    }

    void run(const Model& model) {
        const Heads rows = {nullptr, 0, 2 * (kPast + 1) * kHeadWidth, 2 * kHeadWidth};
        AttendedToken& attended = token.attended;
        attended.x = bytes(x);
        attended.cos = bytes(cos);
        attended.sin = bytes(sin);
        attended.turned = kTurned;
        attended.k = attended.v = rows;
        attended.k.data = bytes(keys);
        attended.v.data = bytes(values);
        attended.tokens = kPast;
        attended.y = bytes(h);
        attended.normed = bytes(normed);
        token.block.ids = ids.data();
        token.block.weights = weights.data();
        token.block.logits = reinterpret_cast<uint8_t*>(logits.data());
        token.block.shared = bytes(shared);
        token.block.experts = &model.table;
        token.block.y = bytes(y);
        run_layer(model.layer, &token);
    }
};

float wide(uint16_t number) {
    return bf16_to_float(number);
}

Halves product(const Projection& by, Halves& x) {
    Halves y(static_cast<size_t>(by.w.n));
    const Product made{by.w, Number::kBf16, 1, bytes(x), by.bias, bytes(y)};
    run(*make_linear(made));
    return y;
}

Halves both(const Halves& a, const Halves& b, float (*of)(float, float)) {
    Halves made;
    for (size_t i = 0; i < a.size(); ++i) made.push_back(float_to_bf16(of(wide(a[i]), wide(b[i]))));
    return made;
}

float sum(float a, float b) {
    return a + b;
}

float times(float a, float b) {
    return a * b;
}

Halves normalised(const Norm& norm, Halves& x) {
    Halves y(x.size());
    normalise_rows(norm, bytes(x), 2 * norm.width, bytes(y), 2 * norm.width,
                   static_cast<int64_t>(x.size()) / norm.width);
    return y;
}

void turn(Case& of, Halves& x, int64_t heads) {
    Halves y(x.size());
    Rotary rotary;
    rotary.number = Number::kBf16;
    rotary.batch = rotary.tokens = 1;
    rotary.heads = heads;
    rotary.width = kHeadWidth;
    rotary.turned = kTurned;
    rotary.x = {bytes(x), 0, 2 * kHeadWidth, 0};
    rotary.y = {bytes(y), 0, 2 * kHeadWidth, 0};
    rotary.cos = bytes(of.cos);
    rotary.sin = bytes(of.sin);
    rotate(rotary);
    x = y;
}

Halves attended(const Model& model, Case& of) {
    const SelfAttention& attention = model.layer.attention;
    Halves x = normalised(attention.before, of.x);
    Halves q = product(attention.q, x), k = product(attention.k, x), v = product(attention.v, x);
    q = normalised(attention.q_norm, q);
    turn(of, q, kHeads);
    turn(of, k, kKvHeads);
    for (int64_t head = 0; head < kKvHeads; ++head) {
        const int64_t to = (head * (kPast + 1) + kPast) * kHeadWidth;
        std::memcpy(of.keys.data() + to, k.data() + head * kHeadWidth, 2 * kHeadWidth);
        std::memcpy(of.values.data() + to, v.data() + head * kHeadWidth, 2 * kHeadWidth);
    }
    Halves y(static_cast<size_t>(kHeads * kHeadWidth));
    Attention inner;
    inner.number = Number::kBf16;
    inner.batch = 1;
    inner.heads = kHeads;
    inner.kv_heads = kKvHeads;
    inner.tokens = kPast + 1;
    inner.width = inner.value_width = kHeadWidth;
    inner.scale = attention.scale;
    inner.q = {bytes(q), 0, 2 * kHeadWidth, 0};
    inner.k = {bytes(of.keys), 0, 2 * (kPast + 1) * kHeadWidth, 2 * kHeadWidth};
    inner.v = {bytes(of.values), 0, 2 * (kPast + 1) * kHeadWidth, 2 * kHeadWidth};
    inner.y = bytes(y);
    attend(inner);
    return product(attention.o, y);
}

Halves curved(const Model& model, Halves x) {
    for (uint16_t& number : x) number = model.curve[number];
    return x;
}

// The parts one by one.
Halves expected(Model& model, Case& of) {
    const MoeBlock& block = model.layer.block;
    Halves given = attended(model, of);
    const Halves h = both(of.x, given, sum);
    Halves at_h = h, normed = normalised(model.layer.attention.after, at_h);
    std::vector<float> logits(kExperts);
    if (block.logits == Number::kFp32) {
        std::vector<float> x;
        for (const uint16_t number : normed) x.push_back(wide(number));
        Product fine{block.router.w,
                     Number::kFp32,
                     1,
                     reinterpret_cast<const uint8_t*>(x.data()),
                     nullptr,
                     reinterpret_cast<uint8_t*>(logits.data())};
        fine.w.format = Format::kFp32;
        fine.w.data = reinterpret_cast<const uint8_t*>(model.fine_router.data());
        run(*make_linear(fine));
    } else {
        const Halves rounded = product(block.router, normed);
        for (size_t i = 0; i < rounded.size(); ++i) logits[i] = wide(rounded[i]);
    }
    std::vector<int64_t> ids(kTopK);
    std::vector<float> weights(kTopK), out(kHidden);
    pick(block.rule, logits.data(), ids.data(), weights.data());
    std::vector<size_t> places = {0, 1, 2, 3};
    std::sort(places.begin(), places.end(), [&](size_t a, size_t b) { return ids[a] < ids[b]; });
    Step step;
    step.gate = block.gate;
    step.number = Number::kBf16;
    step.hidden = kHidden;
    step.width = kWidth;
    step.x = bytes(normed);
    step.out = out.data();
    for (const size_t place : places) {
        Group group;
        group.expert = model.table.experts[static_cast<size_t>(ids[place])];
        group.tokens = 1;
        group.weights = &weights[place];
        step.groups.push_back(group);
    }
    run(*make_ffn(step));
    Halves experts;
    for (const float value : out) experts.push_back(float_to_bf16(wide(float_to_bf16(value)) * block.scale));
    Halves inner =
        both(curved(model, product(block.shared.gate, normed)), curved(model, product(block.shared.up, normed)), times);
    const Halves share = curved(model, product(block.shared.share, normed));
    const Halves shared = both(product(block.shared.down, inner), Halves(kHidden, share[0]), times);
    return both(h, both(experts, shared, sum), sum);
}

int64_t apart(const Halves& a, const Halves& b) {
    int64_t count = 0;
    for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
    return count;
}

int64_t check() {
    int64_t wrong = 0;
    for (const bool is_fine : {false, true}) {
        Model model(is_fine);
        constexpr unsigned kThreads = 4, kRounds = 3;
        std::vector<int64_t> each(kThreads);
        std::vector<std::thread> threads;
        for (unsigned thread = 0; thread < kThreads; ++thread) {
            Case known(thread);
            const Halves wanted = expected(model, known);
            threads.emplace_back([&model, &each, thread, wanted, known]() mutable {
                for (unsigned round = 0; round < kRounds; ++round) {
                    known.run(model);
                    each[thread] += apart(known.y, wanted) + (known.token.block.experts_s < 0);
                }
            });
        }
        for (std::thread& thread : threads) thread.join();
        for (const int64_t count : each) wrong += count;
    }
    return wrong;
}

}  // namespace

int main() {
    int64_t wrong = 0;
    std::istringstream names(isa_names(true));
    for (std::string name; names >> name;) {
        use_isa(name.c_str());
        const int64_t count = check();
        std::printf("%-12s tokens through layers: %lld numbers wrong\n", name.c_str(), static_cast<long long>(count));
        wrong += count;
    }
    stop_threads();
    return wrong == 0 ? 0 : 1;
}
