// Work for the checks of the pool: what keeps count of itself, and of what does not hold.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "pool.h"

using moert::Work;
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

inline std::atomic<int> failures{0};

#define CHECK(condition) check(condition, #condition, __FILE__, __LINE__)

inline void check(bool holds, const char* what, const char* file, int line) {
    if (holds) return;
    failures++;
    std::fprintf(stderr, "%s:%d: %s does not hold\n", file, line, what);
}

template <class Error>
inline bool throws(const std::function<void()>& body) {
    try {
        body();
    } catch (const Error&) {
        return true;
    }
    return false;
}

inline void busy(microseconds time) {
    const auto end = Clock::now() + time;
    while (Clock::now() < end) {
    }
}

// Ends the program if it takes too long, for then some thread would never return.
inline void await(const char* what, const std::function<bool()>& condition) {
    const auto patience = Clock::now() + std::chrono::seconds(60);
    while (!condition()) {
        if (Clock::now() > patience) {
            std::fprintf(stderr, "%s: waited for %s for a minute\n", __FILE__, what);
            std::_Exit(1);
        }
        std::this_thread::sleep_for(microseconds(200));
    }
}

// What one function does for every task.
class Simple : public Work {
  public:
    Simple(std::vector<int64_t> tasks, std::function<void(int, int64_t)> body)
        : tasks_(std::move(tasks)), body_(std::move(body)) {}
    int phases() const override { return static_cast<int>(tasks_.size()); }
    int64_t tasks(int phase) const override { return tasks_[static_cast<size_t>(phase)]; }
    void run(int phase, int64_t task) override { body_(phase, task); }

  private:
    std::vector<int64_t> tasks_;
    std::function<void(int, int64_t)> body_;
};

inline std::unique_ptr<Work> simple(std::vector<int64_t> tasks, std::function<void(int, int64_t)> body) {
    return std::make_unique<Simple>(std::move(tasks), std::move(body));
}

// Counts of a job, outside of its work so that they outlive it.
struct Record {
    explicit Record(const std::vector<int64_t>& tasks) : finished(tasks.size()), runs(tasks.size()) {
        for (size_t phase = 0; phase < tasks.size(); phase++) {
            runs[phase] = std::vector<std::atomic<int>>(static_cast<size_t>(tasks[phase]));
        }
    }
    std::vector<std::atomic<int64_t>> finished;
    std::vector<std::vector<std::atomic<int>>> runs;
    int64_t plain = 0;  // no atomic: whoever is in a phase of one task must see what all before have written
    std::atomic<int> inside{0}, most_inside{0}, destroyed{0};
};

// Every task checks that the phases before are over and that none after has begun.
class Strict : public Work {
  public:
    Strict(const std::vector<int64_t>& tasks, Record* record, microseconds time)
        : tasks_(tasks), record_(record), time_(time) {}
    ~Strict() override { record_->destroyed++; }
    int phases() const override { return static_cast<int>(tasks_.size()); }
    int64_t tasks(int phase) const override { return tasks_[static_cast<size_t>(phase)]; }

    void run(int phase, int64_t task) override {
        const int inside = ++record_->inside;
        for (int most = record_->most_inside;
             inside > most && !record_->most_inside.compare_exchange_weak(most, inside);) {
        }
        for (size_t i = 0; i < tasks_.size(); i++) {
            const int64_t finished = record_->finished[i];
            if (i < static_cast<size_t>(phase)) CHECK(finished == tasks_[i]);
            if (i > static_cast<size_t>(phase)) CHECK(finished == 0);
        }
        if (tasks(phase) == 1) record_->plain++;
        record_->runs[static_cast<size_t>(phase)][static_cast<size_t>(task)]++;
        if (time_.count() > 0) busy(time_);
        record_->finished[static_cast<size_t>(phase)]++;
        record_->inside--;
    }

  private:
    std::vector<int64_t> tasks_;
    Record* record_;
    microseconds time_;
};

inline void check_complete(const std::vector<int64_t>& tasks, const Record& record) {
    int64_t single = 0;
    for (size_t phase = 0; phase < tasks.size(); phase++) {
        CHECK(record.finished[phase] == tasks[phase]);
        for (const auto& runs : record.runs[phase]) CHECK(runs == 1);
        single += tasks[phase] == 1;
    }
    CHECK(record.plain == single);
}

inline std::vector<int64_t> random_tasks(std::mt19937& random) {
    std::vector<int64_t> tasks(random() % 6);
    for (int64_t& count : tasks) {
        const unsigned kind = random() % 8;
        count = kind == 0 ? 0 : kind <= 2 ? 1 : static_cast<int64_t>(random() % (kind == 3 ? 300 : 12));
    }
    return tasks;
}
