#include "arriving.h"

#include <utility>

#include "combine.h"
#include "pointwise.h"

namespace moert {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

ArrivingStep::ArrivingStep(Step step, std::vector<ArrivingExpert> experts)
    : step_(std::move(step)), experts_(std::move(experts)) {
    for (size_t i = 0; i < experts_.size(); ++i) left_.push_back(i);
}

bool ArrivingStep::advance(std::chrono::nanoseconds limit) {
    while (!left_.empty()) {
        std::vector<size_t> there, coming;
        bool is_any_over = false;
        for (size_t place : left_) {
            const auto& record = experts_[place].record;
            const ReadState state = record == nullptr ? ReadState::kWhole : record->outcome.state();
            if (state == ReadState::kUnderWay) {
                coming.push_back(place);
                continue;
            }
            is_any_over = true;
            if (state == ReadState::kWhole) there.push_back(place);
        }
        left_ = coming;
        if (!there.empty()) compute(there);
        if (is_any_over) continue;
        const auto begin = Clock::now();
        const bool is_over = experts_[left_.front()].record->outcome.wait(limit);
        waited_s_ += seconds_since(begin);
        if (!is_over) return false;
    }
    return true;
}

void ArrivingStep::compute(const std::vector<size_t>& places) {
    const auto begin = Clock::now();
    Step step = step_;
    int64_t nbytes = 0;
    for (size_t place : places) {
        Group group;
        group.expert = experts_[place].expert;
        group.tokens = 1;
        group.out_row = static_cast<int64_t>(place);
        nbytes += weight_bytes(group.expert.up) + weight_bytes(group.expert.down);
        step.groups.push_back(group);
    }
    run_reading(nbytes, *make_ffn(std::move(step)));
    for (size_t place : places) experts_[place].is_computed = true;
    computed_s_ += seconds_since(begin);
}

void ArrivingStep::sum(uint8_t* y) const {
    std::vector<float> sums(static_cast<size_t>(step_.hidden));
    for (size_t i = 0; i < experts_.size(); ++i) {
        const float* row = step_.out + static_cast<int64_t>(i) * step_.hidden;
        add_rows(row, 1, step_.hidden, nullptr, experts_[i].weight, sums.data());
    }
    pointwise().narrow(sums.data(), step_.number, y, step_.hidden);
}

}  // namespace moert
