#include "self_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "foresight.h"
#include "isa.h"
#include "norm.h"
#include "packed.h"
#include "rotary.h"
#include "scratch.h"
#include "split.h"

namespace moert {
namespace {

// Where each result is in the scratch memory.
struct Layout : ScratchLayout {
    explicit Layout(const SelfAttention& of) {
        const int64_t size = bytes_of(of.number);
        const int64_t q_bytes = of.heads * of.width * size, kv_bytes = of.kv_heads * of.width * size;
        x = take(of.hidden * size);
        packed = take(std::max(
            {find_kernel(of.q.w, 1).block_bytes(of.hidden), find_kernel(of.k.w, 1).block_bytes(of.hidden),
             find_kernel(of.v.w, 1).block_bytes(of.hidden), find_kernel(of.o.w, 1).block_bytes(of.heads * of.width)}));
        q = take(q_bytes);
        k = take(kv_bytes);
        v = take(kv_bytes);
        normed_q = take(q_bytes);
        normed_k = take(kv_bytes);
        turned_q = take(q_bytes);
        attended = take(q_bytes);
        o = take(of.hidden * size);
    }

    int64_t x, packed, q, k, v, normed_q, normed_k, turned_q, attended, o;
};

class SelfAttentionWork final : public Work {
  public:
    SelfAttentionWork(const SelfAttention& attention, const AttendedToken& token)
        : of_(attention),
          token_(token),
          at_(attention),
          scratch_(static_cast<size_t>(at_.nbytes())),
          attention_(inner()),
          in_(share_out({attention.q.w.n, attention.k.w.n, attention.v.w.n}, kMostRows, threads())),
          out_(share_out(1, attention.hidden, kMostRows, threads())) {
        for (const Projection* projection : {&of_.q, &of_.k, &of_.v})
            note_reading(projection->w.data, weight_bytes(projection->w));
        const uint8_t* x = token.x;
        if (of_.before.width != 0) {
            pointwise().normalise(of_.before, x, at(at_.x));
            x = at(at_.x);
        }
        // The three have the same kernel: it depends on format and columns.
        pack_block(find_kernel(of_.q.w, 1), of_.number, x, nullptr, 1, of_.hidden, 0, at(at_.packed));
    }

    int phases() const override { return 5; }

    int64_t tasks(int phase) const override {
        switch (phase) {
            case 0:
                return static_cast<int64_t>(in_.size());
            case 1:
                return 2;
            case 2:
                return attention_.tasks(0);
            case 3:
                return 1;
            default:
                return static_cast<int64_t>(out_.size());
        }
    }

    void run(int phase, int64_t task) override {
        switch (phase) {
            case 0: {
                const Rows& rows = in_[static_cast<size_t>(task)];
                const Projection* const from[] = {&of_.q, &of_.k, &of_.v};
                const int64_t to[] = {at_.q, at_.k, at_.v};
                return project(*from[rows.part], rows, at(to[rows.part]));
            }
            case 1:
                return task == 0 ? place_query() : place_key_and_value();
            case 2:
                return attention_.run(0, task);
            case 3:
                note_reading(of_.o.w.data, weight_bytes(of_.o.w));
                attention_.run(1, 0);
                return pack_block(find_kernel(of_.o.w, 1), of_.number, at(at_.attended), nullptr, 1,
                                  of_.heads * of_.width, 0, at(at_.packed));
            default:
                return project(of_.o, out_[static_cast<size_t>(task)], of_.after.width == 0 ? token_.y : at(at_.o));
        }
    }

    // After all phases.
    void finish() {
        if (of_.after.width == 0) return;
        const Pointwise& each = pointwise();
        const size_t n = static_cast<size_t>(of_.hidden);
        std::vector<float> sums(2 * n);
        each.widen(of_.number, token_.x, sums.data(), of_.hidden);
        each.widen(of_.number, at(at_.o), sums.data() + n, of_.hidden);
        each.add(sums.data(), sums.data() + n, of_.hidden);
        each.narrow(sums.data(), of_.number, token_.y, of_.hidden);
        each.normalise(of_.after, token_.y, token_.normed);
    }

  private:
    uint8_t* at(int64_t offset) const { return scratch_.data() + offset; }

    Attention inner() const {
        const int64_t head_bytes = of_.width * bytes_of(of_.number);
        Attention inner;
        inner.number = of_.number;
        inner.batch = 1;
        inner.heads = of_.heads;
        inner.kv_heads = of_.kv_heads;
        inner.tokens = token_.tokens + 1;
        inner.width = inner.value_width = of_.width;
        inner.scale = of_.scale;
        inner.q = {query(), of_.heads * head_bytes, head_bytes, 0};
        inner.k = token_.k;
        inner.v = token_.v;
        inner.y = at(at_.attended);
        return inner;
    }

    uint8_t* query() const {
        return at(token_.turned != 0 ? at_.turned_q : of_.q_norm.width != 0 ? at_.normed_q : at_.q);
    }

    void project(const Projection& by, const Rows& rows, uint8_t* y) {
        const int64_t size = bytes_of(of_.number);
        const Pointwise& each = pointwise();
        float* sums = thread_floats(static_cast<size_t>(2 * rows.count));
        find_kernel(by.w, 1).rows(by.w, rows.begin, rows.begin + rows.count, at(at_.packed), 1, sums, rows.count);
        if (by.bias != nullptr) {
            float* biases = sums + rows.count;
            each.widen(of_.number, by.bias + rows.begin * size, biases, rows.count);
            each.add(sums, biases, rows.count);
        }
        each.narrow(sums, of_.number, y + rows.begin * size, rows.count);
    }

    const uint8_t* normalise(const Norm& norm, const uint8_t* x, int64_t heads, uint8_t* y) const {
        if (norm.width == 0) return x;
        const int64_t step = norm.width * bytes_of(of_.number);
        normalise_rows(norm, x, step, y, step, heads * of_.width / norm.width);
        return y;
    }

    void turn(const uint8_t* x, int64_t heads, uint8_t* y, int64_t y_step) const {
        const int64_t head_bytes = of_.width * bytes_of(of_.number);
        Rotary rotary;
        rotary.number = of_.number;
        rotary.batch = rotary.tokens = 1;
        rotary.heads = heads;
        rotary.width = of_.width;
        rotary.turned = token_.turned;
        rotary.x = {const_cast<uint8_t*>(x), 0, head_bytes, 0};
        rotary.y = {y, 0, y_step, 0};
        rotary.cos = token_.cos;
        rotary.sin = token_.sin;
        rotate(rotary);
    }

    void place_query() {
        const uint8_t* q = normalise(of_.q_norm, at(at_.q), of_.heads, at(at_.normed_q));
        if (token_.turned != 0) turn(q, of_.heads, at(at_.turned_q), of_.width * bytes_of(of_.number));
    }

    void place_key_and_value() {
        const int64_t head_bytes = of_.width * bytes_of(of_.number);
        const uint8_t* k = normalise(of_.k_norm, at(at_.k), of_.kv_heads, at(at_.normed_k));
        uint8_t* const k_place = token_.k.data + token_.tokens * token_.k.token_step;
        if (token_.turned != 0)
            turn(k, of_.kv_heads, k_place, token_.k.head_step);
        else
            copy_heads(k, k_place, token_.k.head_step, head_bytes);
        copy_heads(at(at_.v), token_.v.data + token_.tokens * token_.v.token_step, token_.v.head_step, head_bytes);
    }

    void copy_heads(const uint8_t* from, uint8_t* to, int64_t to_step, int64_t head_bytes) const {
        for (int64_t head = 0; head < of_.kv_heads; ++head)
            std::memcpy(to + head * to_step, from + head * head_bytes, static_cast<size_t>(head_bytes));
    }

    const SelfAttention& of_;
    const AttendedToken& token_;
    const Layout at_;
    const Scratch scratch_;
    AttentionWork attention_;
    const std::vector<Rows> in_, out_;
};

}  // namespace

void attend_token(const SelfAttention& attention, const AttendedToken& token) {
    SelfAttentionWork work(attention, token);
    run_reading(weight_bytes(attention.q.w) + weight_bytes(attention.o.w), work);
    work.finish();
}

}  // namespace moert
