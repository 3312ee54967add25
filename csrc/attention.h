// Attention of one query token a sequence.
#pragma once

#include <cstdint>
#include <memory>

#include "pointwise.h"
#include "pool.h"

namespace moert {

// Chunks of tokens apart, then all of them together; as part of other work, too.
class AttentionWork : public Work {
  public:
    // Throws std::bad_alloc.
    explicit AttentionWork(const Attention& attention);

    int phases() const override { return 2; }
    int64_t tasks(int phase) const override;
    void run(int phase, int64_t task) override;

  private:
    float* share_of(int64_t batch, int64_t chunk, int64_t head);
    void attend_task(int64_t task);
    void merge_task(int64_t batch);

    const Attention of_;
    const int64_t group_, packs_, chunks_, share_floats_;
    const std::unique_ptr<float[]> shares_;
};

// `heads` is a multiple of `kv_heads`; all sizes are at least 1. The result depends on no address and not on how many
// threads there are. Throws PoolError as run() does where there is much to do, and std::bad_alloc.
void attend(const Attention& attention);

// Whether there is much.
bool is_shared_out(const Attention& attention);

}  // namespace moert
