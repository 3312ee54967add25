// How threads share the tasks of jobs: claims, barriers between phases, sleeping and waking. It owns no thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "futex.h"
#include "pool.h"

namespace moert {

constexpr size_t kApart = 128;  // some processors fetch lines in pairs

// Jobs are used again and never freed: a worker may still look at `unclaimed` of one that is over. What it finds there
// is a task of whatever the job is by then, or none; only who has a task in hand may read the rest.
class Job {
  public:
    struct Phase {
        int number;
        int64_t tasks;
    };
    enum Seat : int { kFree, kCaller, kWorker };

    // Changed only while nobody can have a task in hand.
    Work* work = nullptr;
    std::unique_ptr<Work> owned;
    std::vector<Phase> phases;  // the empty ones left out
    size_t phase = 0;

    alignas(kApart) std::atomic<int64_t> unclaimed{0};   // of this phase; below 0 by as many as asked in vain
    alignas(kApart) std::atomic<int64_t> unfinished{0};  // of this phase; each participant reports once
    alignas(kApart) std::atomic<bool> done{false};
    std::atomic<Seat> seat{kFree};  // who has the one place that is not a worker's, or a lone worker's
    std::atomic<int> sleeping{0};   // threads that wait for `word` to change
    FutexWord word{0};
};

class JobQueue {
  public:
    // Guards the order of jobs; held by the caller where a comment says so. Nobody who holds it waits for a task.
    std::mutex& mutex() { return mutex_; }

    // Throws std::invalid_argument for a negative count; a job without tasks is done already.
    std::shared_ptr<Job> make(Work* work, std::unique_ptr<Work> owned, Job::Seat seat);

    // Puts the job last, under the mutex; `start`, without it, then lets threads claim its tasks.
    void push(std::shared_ptr<Job> job);
    void start(Job& job) { open(job); }

    size_t size() const { return queue_.size(); }  // under the mutex

    // Until the job is done; with `takes_part`, working on it. Throws PoolError once the queue is closed.
    void wait(Job& job, bool takes_part);

    // All of the work on the calling thread, beside the queue. Throws PoolError once the queue is closed.
    void run_here(Work& work);

    // A worker's life, until `release_workers`. An `alone` one works on no job that a caller works on.
    void work(bool alone);
    void release_workers();
    void welcome_workers() { leave_.store(false); }  // once all have been joined

    // What idle workers do before they wait; null: nothing. See pool.h.
    void set_pastime(bool (*piece)()) { pastime_.store(piece); }

    // No task starts any more: `close`, under the mutex, and, without it and after the last worker is gone, `drain`.
    void close();
    void drain();
    bool closed() const { return closing_.load(); }

    static bool in_task();

    void lock_for_fork();
    void unlock_after_fork();
    // In a fork, which has no other thread than the one that forked: nobody else is within a task.
    void forget_callers() { callers_.store(0); }

  private:
    void recycle(Job* job);
    void show();
    void open(Job& job);
    void finish(Job& job);
    void take_part(Job& job, const uint32_t* seen) noexcept;
    bool help(uint32_t seen, bool alone, bool woken);
    void pass_time(uint32_t seen);
    void wake_workers(int64_t wanted);
    void wake_waiting(Job& job);
    [[noreturn]] void give_up();

    alignas(kApart) FutexWord epoch_{0};  // changes after tasks have become available; idle workers watch it
    alignas(kApart) std::atomic<int> sleepers_{0};
    alignas(kApart) std::atomic<Job*> window_[32] = {};  // the front of queue_, then null: what workers look at
    alignas(kApart) std::atomic<int> workers_{0};
    std::atomic<bool> leave_{false}, closing_{false}, drained_{false};
    std::atomic<bool (*)()> pastime_{nullptr};
    alignas(kApart) std::atomic<int> callers_{0};  // threads that are no workers and may be within a task

    alignas(kApart) std::mutex mutex_;
    std::deque<std::shared_ptr<Job>> queue_;
    std::mutex recycled_mutex_;  // the inner one; who holds mutex_ may wait for a worker that drops its job
    std::vector<Job*> recycled_;
};

}  // namespace moert
