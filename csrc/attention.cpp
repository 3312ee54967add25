#include "attention.h"

#include <algorithm>

namespace moert {
namespace {

constexpr int64_t kFewNumbers = 1 << 16;

}  // namespace

AttentionWork::AttentionWork(const Attention& attention)
    : of_(attention),
      group_(attention.heads / attention.kv_heads),
      packs_((group_ + kHeadsAtOnce - 1) / kHeadsAtOnce),
      chunks_((attention.tokens + kChunkTokens - 1) / kChunkTokens),
      share_floats_(kShareHead + attention.value_width),
      shares_(new float[static_cast<size_t>(attention.batch * attention.heads * chunks_ * share_floats_)]) {}

int64_t AttentionWork::tasks(int phase) const {
    return phase == 0 ? of_.batch * of_.kv_heads * packs_ * chunks_ : of_.batch;
}

void AttentionWork::run(int phase, int64_t task) {
    if (phase == 0)
        attend_task(task);
    else
        merge_task(task);
}

float* AttentionWork::share_of(int64_t batch, int64_t chunk, int64_t head) {
    return shares_.get() + ((batch * chunks_ + chunk) * of_.heads + head) * share_floats_;
}

void AttentionWork::attend_task(int64_t task) {
    const int64_t pack = task % packs_, kv_head = task / packs_ % of_.kv_heads;
    const int64_t chunk = task / packs_ / of_.kv_heads % chunks_, batch = task / packs_ / of_.kv_heads / chunks_;
    const int64_t head = kv_head * group_ + pack * kHeadsAtOnce, begin = chunk * kChunkTokens;
    pointwise().attend(of_, batch, head, std::min(kHeadsAtOnce, group_ - pack * kHeadsAtOnce), begin,
                       std::min(kChunkTokens, of_.tokens - begin), share_of(batch, chunk, head));
}

void AttentionWork::merge_task(int64_t batch) {
    const int64_t bytes = of_.value_width * bytes_of(of_.number);
    for (int64_t head = 0; head < of_.heads; ++head)
        pointwise().merge(of_, share_of(batch, 0, head), chunks_, of_.heads * share_floats_,
                          of_.y + (batch * of_.heads + head) * bytes);
}

bool is_shared_out(const Attention& of) {
    return of.batch * of.kv_heads > 1 &&
           of.batch * of.kv_heads * of.tokens * (of.width + of.value_width) > 2 * kFewNumbers;
}

void attend(const Attention& attention) {
    AttentionWork work(attention);
    if (is_shared_out(attention))
        run(work);
    else
        run_alone(work);
}

}  // namespace moert
