// One token's experts, some of which are still being read: each is computed as soon as its record is there.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "ffn.h"
#include "reader.h"

namespace moert {

struct ArrivingExpert {
    Expert expert;
    std::shared_ptr<Record> record;  // null: the weights are there
    const float* weight = nullptr;
    bool is_computed = false;
};

// What the experts give for `step.x`, one row; row i of `step.out` [experts, hidden], all zero at first, becomes what
// expert i gives. The memory must stay until it is over, whatever becomes of the reads.
class ArrivingStep {
  public:
    ArrivingStep(Step step, std::vector<ArrivingExpert> experts);

    // Computes what is there, waits for the rest and computes that; returns once nothing is left to wait for, or has
    // come for as long as `limit`. True: it is over, and what has not been computed has not been read. Throws as run()
    // does, and std::bad_alloc.
    bool advance(std::chrono::nanoseconds limit);

    // y [hidden] = the sum of all rows times their weights, in the order of the experts, in fp32 with a rounding after
    // each product and each sum, and rounded once. All have been computed.
    void sum(uint8_t* y) const;

    const std::vector<ArrivingExpert>& experts() const { return experts_; }
    double computed_s() const { return computed_s_; }
    double waited_s() const { return waited_s_; }

  private:
    void compute(const std::vector<size_t>& places);

    Step step_;
    std::vector<ArrivingExpert> experts_;
    std::vector<size_t> left_;  // places of those whose outcome nobody has seen
    double computed_s_ = 0, waited_s_ = 0;
};

}  // namespace moert
