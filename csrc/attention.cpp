#include "attention.h"

#include <algorithm>
#include <memory>

#include "pool.h"

namespace moert {
namespace {

constexpr int64_t kFewNumbers = 1 << 16;

class AttentionWork : public Work {
  public:
    explicit AttentionWork(const Attention& attention)
        : of_(attention),
          group_(attention.heads / attention.kv_heads),
          packs_((group_ + kHeadsAtOnce - 1) / kHeadsAtOnce),
          chunks_((attention.tokens + kChunkTokens - 1) / kChunkTokens),
          share_floats_(kShareHead + attention.value_width),
          shares_(new float[static_cast<size_t>(attention.batch * attention.heads * chunks_ * share_floats_)]) {}

    int phases() const override { return 2; }
    int64_t tasks(int phase) const override {
        return phase == 0 ? of_.batch * of_.kv_heads * packs_ * chunks_ : of_.batch;
    }
    void run(int phase, int64_t task) override {
        if (phase == 0)
            attend_task(task);
        else
            merge_task(task);
    }

  private:
    float* share_of(int64_t batch, int64_t chunk, int64_t head) {
        return shares_.get() + ((batch * chunks_ + chunk) * of_.heads + head) * share_floats_;
    }

    void attend_task(int64_t task) {
        const int64_t pack = task % packs_, kv_head = task / packs_ % of_.kv_heads;
        const int64_t chunk = task / packs_ / of_.kv_heads % chunks_, batch = task / packs_ / of_.kv_heads / chunks_;
        const int64_t head = kv_head * group_ + pack * kHeadsAtOnce, begin = chunk * kChunkTokens;
        pointwise().attend(of_, batch, head, std::min(kHeadsAtOnce, group_ - pack * kHeadsAtOnce), begin,
                           std::min(kChunkTokens, of_.tokens - begin), share_of(batch, chunk, head));
    }

    void merge_task(int64_t batch) {
        const int64_t bytes = of_.value_width * bytes_of(of_.number);
        for (int64_t head = 0; head < of_.heads; ++head)
            pointwise().merge(of_, share_of(batch, 0, head), chunks_, of_.heads * share_floats_,
                              of_.y + (batch * of_.heads + head) * bytes);
    }

    const Attention of_;
    const int64_t group_, packs_, chunks_, share_floats_;
    const std::unique_ptr<float[]> shares_;
};

}  // namespace

bool is_shared_out(const Attention& of) {
    return of.batch * of.kv_heads > 1 &&
           of.batch * of.kv_heads * of.tokens * (of.width + of.value_width) > 2 * kFewNumbers;
}

void attend(const Attention& attention) {
    AttentionWork work(attention);
    if (is_shared_out(attention)) return run(work);
    for (int phase = 0; phase < work.phases(); ++phase)
        for (int64_t task = 0; task < work.tasks(phase); ++task) work.run(phase, task);
}

}  // namespace moert
