#include "rotary.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace moert {
namespace {

constexpr int64_t kTaskNumbers = 1 << 15;  // some microseconds

void rotate_token(const Rotary& of, const Pointwise& with, int64_t batch, int64_t token) {
    float cos[kMostTurned], sin[kMostTurned];
    const int64_t angles = batch * of.angle_batch_step + token * of.angle_token_step;
    with.widen(of.number, of.cos + angles, cos, of.turned);
    with.widen(of.number, of.sin + angles, sin, of.turned);
    const uint8_t* x = of.x.data + batch * of.x.batch_step + token * of.x.token_step;
    uint8_t* y = of.y.data + batch * of.y.batch_step + token * of.y.token_step;
    const int64_t turned_bytes = of.turned * bytes_of(of.number);
    const size_t rest_bytes = static_cast<size_t>((of.width - of.turned) * bytes_of(of.number));
    for (int64_t head = 0; head < of.heads; ++head, x += of.x.head_step, y += of.y.head_step) {
        with.turn(of.number, x, cos, sin, y, of.turned);
        std::memcpy(y + turned_bytes, x + turned_bytes, rest_bytes);
    }
}

class RotaryWork : public Work {
  public:
    explicit RotaryWork(const Rotary& rotary)
        : rotary_(rotary), task_tokens_(std::max<int64_t>(1, kTaskNumbers / (rotary.heads * rotary.width))) {}

    int phases() const override { return 1; }
    int64_t tasks(int) const override { return (tokens() + task_tokens_ - 1) / task_tokens_; }
    void run(int, int64_t task) override {
        const Pointwise& with = pointwise();
        const int64_t end = std::min(tokens(), (task + 1) * task_tokens_);
        for (int64_t i = task * task_tokens_; i < end; ++i)
            rotate_token(rotary_, with, i / rotary_.tokens, i % rotary_.tokens);
    }

  private:
    int64_t tokens() const { return rotary_.batch * rotary_.tokens; }

    const Rotary rotary_;
    const int64_t task_tokens_;
};

}  // namespace

bool is_shared_out(const Rotary& rotary) {
    return rotary.batch * rotary.tokens > 1 &&
           rotary.batch * rotary.tokens * rotary.heads * rotary.width > 2 * kTaskNumbers;
}

void rotate(const Rotary& rotary) {
    if (is_shared_out(rotary)) {
        RotaryWork work(rotary);
        return run(work);
    }
    const Pointwise& with = pointwise();
    for (int64_t batch = 0; batch < rotary.batch; ++batch)
        for (int64_t token = 0; token < rotary.tokens; ++token) rotate_token(rotary, with, batch, token);
}

}  // namespace moert
