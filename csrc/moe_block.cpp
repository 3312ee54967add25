#include "moe_block.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <vector>

#include "foresight.h"
#include "isa.h"
#include "packed.h"
#include "scratch.h"
#include "split.h"

namespace moert {
namespace {

constexpr int64_t kWidenedRows = 8;  // of a weight of 16 bits, for a product in fp32: they stay in the caches

Number number_of(const Matrix& w) {
    return w.format == Format::kFp32 ? Number::kFp32 : w.format == Format::kBf16 ? Number::kBf16 : Number::kFp16;
}

// The same weight in fp32, as far as kernels are chosen by it.
Matrix in_fp32(Matrix w) {
    w.format = Format::kFp32;
    return w;
}

// The router and the shared expert: all that is known of x before experts are picked.
class RoutedWork final : public Work {
  public:
    RoutedWork(const MoeBlock& block, BlockToken* token)
        : of_(block), token_(token), layout_(block), scratch_(static_cast<size_t>(layout_.nbytes())) {
        const SharedExpert& shared = of_.shared;
        // The shared expert's first, as there is more to do with them.
        in_ = {&shared.gate, &shared.up, &shared.share, &of_.router};
        std::vector<int64_t> rows;
        for (const Projection* projection : in_) rows.push_back(projection->w.n);
        in_tasks_ = share_out(rows, kMostRows, threads());
        if (of_.has_shared()) down_tasks_ = share_out(1, of_.hidden, kMostRows, threads());
        for (const Projection* projection : in_) note(*projection);
        // A single token's x is packed sooner than another thread is told to.
        if (of_.has_shared()) pack(shared.up.w, token_->x, of_.number, at(layout_.x));
        if (has_fine_router())
            pack(in_fp32(of_.router.w), token_->x, of_.number, at(layout_.fine_x));
        else if (!of_.has_shared())
            pack(of_.router.w, token_->x, of_.number, at(layout_.x));
    }

    int64_t nbytes() const {
        int64_t sum = weight_bytes(of_.shared.down.w);
        for (const Projection* projection : in_) sum += weight_bytes(projection->w);
        return sum;
    }

    int phases() const override { return of_.has_shared() ? 3 : 2; }

    int64_t tasks(int phase) const override {
        if (phase == 0) return static_cast<int64_t>(in_tasks_.size());
        return phase == 1 ? 1 + of_.has_shared() : static_cast<int64_t>(down_tasks_.size());
    }

    void run(int phase, int64_t task) override {
        if (phase == 0) {
            const Rows& rows = in_tasks_[static_cast<size_t>(task)];
            const SharedExpert& shared = of_.shared;
            switch (rows.part) {
                case 0:
                    return multiply(shared.gate, at(layout_.x), rows, of_.number, at(layout_.gate));
                case 1:
                    return multiply(shared.up, at(layout_.x), rows, of_.number, at(layout_.up));
                case 2:
                    return multiply(shared.share, at(layout_.x), rows, of_.number, at(layout_.share));
                default:
                    return has_fine_router() ? multiply_finely(rows)
                                             : multiply(of_.router, at(layout_.x), rows, of_.logits, token_->logits);
            }
        }
        if (phase == 1) return task == 0 ? pick_experts() : place_h();
        note(of_.shared.down);
        const Rows& rows = down_tasks_[static_cast<size_t>(task)];
        multiply(of_.shared.down, at(layout_.packed_h), rows, of_.number, token_->shared);
        if (of_.shared.share.w.n != 0) take_share(rows);
    }

  private:
    // Where each result is in the scratch memory.
    struct Layout : ScratchLayout {
        explicit Layout(const MoeBlock& of) {
            const SharedExpert& shared = of.shared;
            const int64_t size = bytes_of(of.number);
            const Matrix& first = of.has_shared() ? shared.up.w : of.router.w;
            x = take(find_kernel(first, 1).block_bytes(of.hidden));
            fine_x = take(find_kernel(in_fp32(of.router.w), 1).block_bytes(of.hidden));
            if (!of.has_shared()) return;
            gate = take(shared.gate.w.n * size);
            up = take(shared.up.w.n * size);
            h = take(shared.up.w.n * size);
            packed_h = take(find_kernel(shared.down.w, 1).block_bytes(shared.down.w.k));
            share = take(size);
        }

        int64_t x = 0, fine_x = 0, gate = 0, up = 0, h = 0, packed_h = 0, share = 0;
    };

    uint8_t* at(int64_t offset) const { return scratch_.data() + offset; }

    static void note(const Projection& projection) {
        if (projection.w.n != 0) note_reading(projection.w.data, weight_bytes(projection.w));
    }

    bool has_fine_router() const { return of_.logits != of_.number; }

    static void pack(const Matrix& w, const uint8_t* x, Number number, uint8_t* to) {
        pack_block(find_kernel(w, 1), number, x, nullptr, 1, w.k, 0, to);
    }

    static void finish(const Projection& by, float* sums, const Rows& rows, Number number, uint8_t* y) {
        const Pointwise& each = pointwise();
        if (by.bias != nullptr) {
            const Number of_bias = number_of(by.w);
            float biases[kMostRows];
            each.widen(of_bias, by.bias + rows.begin * bytes_of(of_bias), biases, rows.count);
            each.add(sums, biases, rows.count);
        }
        each.narrow(sums, number, y + rows.begin * bytes_of(number), rows.count);
    }

    static void multiply(const Projection& by, const uint8_t* x, const Rows& rows, Number number, uint8_t* y) {
        float* sums = thread_floats(static_cast<size_t>(rows.count));
        find_kernel(by.w, 1).rows(by.w, rows.begin, rows.begin + rows.count, x, 1, sums, rows.count);
        finish(by, sums, rows, number, y);
    }

    // The router's logits in fp32.
    void multiply_finely(const Rows& rows) {
        Matrix some = in_fp32(of_.router.w);
        const Kernel& kernel = find_kernel(some, 1);
        const uint8_t* x = at(layout_.fine_x);
        if (of_.router.w.format == Format::kFp32) {
            float* sums = thread_floats(static_cast<size_t>(rows.count));
            kernel.rows(some, rows.begin, rows.begin + rows.count, x, 1, sums, rows.count);
            return finish(of_.router, sums, rows, of_.logits, token_->logits);
        }
        const int64_t k = of_.hidden;
        const Number number = number_of(of_.router.w);
        float* wide = thread_floats(static_cast<size_t>(kWidenedRows * k + rows.count));
        float* sums = wide + kWidenedRows * k;
        for (int64_t row = 0; row < rows.count; row += kWidenedRows) {
            some.n = std::min(kWidenedRows, rows.count - row);
            pointwise().widen(number, of_.router.w.data + (rows.begin + row) * k * bytes_of(number), wide, some.n * k);
            some.data = reinterpret_cast<const uint8_t*>(wide);
            kernel.rows(some, 0, some.n, x, 1, sums + row, some.n);
        }
        finish(of_.router, sums, rows, of_.logits, token_->logits);
    }

    void pick_experts() {
        std::vector<float> logits(static_cast<size_t>(of_.rule.experts));
        pointwise().widen(of_.logits, token_->logits, logits.data(), of_.rule.experts);
        pick(of_.rule, logits.data(), token_->ids, token_->weights);
    }

    void place_h() {
        const SharedExpert& shared = of_.shared;
        const int64_t width = shared.up.w.n;
        const bool is_gated = shared.gate.w.n != 0;
        uint8_t* h = at(layout_.h);
        const auto* from = reinterpret_cast<const uint16_t*>(at(is_gated ? layout_.gate : layout_.up));
        auto* curved = reinterpret_cast<uint16_t*>(h);
        for (int64_t i = 0; i < width; ++i) curved[i] = shared.curve[from[i]];
        if (is_gated) {
            auto* ups = reinterpret_cast<uint16_t*>(at(layout_.up));
            if (shared.up_curve != nullptr)
                for (int64_t i = 0; i < width; ++i) ups[i] = shared.up_curve[ups[i]];
            multiply_numbers(h, at(layout_.up), width);
        }
        pack(shared.down.w, h, of_.number, at(layout_.packed_h));
    }

    // a = round(a * b)
    void multiply_numbers(uint8_t* a, const uint8_t* b, int64_t n) const {
        const Pointwise& each = pointwise();
        float* wide = thread_floats(static_cast<size_t>(2 * n));
        each.widen(of_.number, a, wide, n);
        each.widen(of_.number, b, wide + n, n);
        for (int64_t i = 0; i < n; ++i) wide[i] *= wide[n + i];
        each.narrow(wide, of_.number, a, n);
    }

    void take_share(const Rows& rows) const {
        const Pointwise& each = pointwise();
        uint16_t given;
        std::memcpy(&given, at(layout_.share), sizeof given);
        float factor;
        each.widen(of_.number, reinterpret_cast<const uint8_t*>(&of_.shared.share_curve[given]), &factor, 1);
        uint8_t* y = token_->shared + rows.begin * bytes_of(of_.number);
        float* wide = thread_floats(static_cast<size_t>(rows.count));
        each.widen(of_.number, y, wide, rows.count);
        for (int64_t i = 0; i < rows.count; ++i) wide[i] *= factor;
        each.narrow(wide, of_.number, y, rows.count);
    }

    const MoeBlock& of_;
    BlockToken* const token_;
    const Layout layout_;
    const Scratch scratch_;
    std::vector<const Projection*> in_;
    std::vector<Rows> in_tasks_, down_tasks_;
};

bool can_compute(const MoeBlock& block, const BlockToken& token) {
    if (token.experts == nullptr) return false;
    for (int64_t i = 0; i < block.rule.top_k; ++i)
        if (token.ids[i] >= static_cast<int64_t>(token.experts->experts.size()) || token.weights[i] == 0) return false;
    return true;
}

void compute(const MoeBlock& block, BlockToken* token) {
    const auto begin = std::chrono::steady_clock::now();
    note_reading(&block, 0);
    const size_t n = static_cast<size_t>(block.hidden);
    std::vector<float> sums(n);
    std::vector<int64_t> places(static_cast<size_t>(block.rule.top_k));
    std::iota(places.begin(), places.end(), int64_t{0});
    std::sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return token->ids[a] < token->ids[b]; });
    Step step;
    step.gate = block.gate;
    step.number = block.number;
    step.hidden = block.hidden;
    step.width = block.width;
    step.x = token->x;
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
    run_reading(nbytes, *make_ffn(std::move(step)));
    const Pointwise& each = pointwise();
    each.round(sums.data(), block.number, block.hidden);
    if (block.scale != 1) {
        for (float& sum : sums) sum *= block.scale;
        each.round(sums.data(), block.number, block.hidden);
    }
    if (block.has_shared()) {
        std::vector<float> shared(n);
        each.widen(block.number, token->shared, shared.data(), block.hidden);
        each.add(sums.data(), shared.data(), block.hidden);
    }
    each.narrow(sums.data(), block.number, token->y, block.hidden);
    token->experts_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

void run_block(const MoeBlock& block, BlockToken* token) {
    RoutedWork work(block, token);
    run_reading(work.nbytes(), work);
    if (can_compute(block, *token)) compute(block, token);
}

}  // namespace moert
