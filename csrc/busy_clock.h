// The time during which at least one of several overlapping things was going on.
#pragma once

#include <chrono>
#include <mutex>

namespace moert {

class BusyClock {
  public:
    void enter() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (inside_++ == 0) since_ = Clock::now();
    }

    void leave() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--inside_ == 0) seconds_ += elapsed();
    }

    double seconds() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return seconds_ + (inside_ > 0 ? elapsed() : 0);
    }

  private:
    using Clock = std::chrono::steady_clock;

    double elapsed() const { return std::chrono::duration<double>(Clock::now() - since_).count(); }

    mutable std::mutex mutex_;
    int inside_ = 0;
    Clock::time_point since_;
    double seconds_ = 0;
};

}  // namespace moert
