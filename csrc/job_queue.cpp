#include "job_queue.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace moert {
namespace {

// A wake-up by the kernel takes tens of microseconds on a virtual machine, about as long as a barrier lasts; who spins
// for longer only keeps the core from others, and the scheduler moves threads to cores whose thread sleeps.
constexpr std::chrono::microseconds kSpin{100};

// Whoever wakes pays a microsecond or more for each thread, so the woken wake the rest.
constexpr int64_t kFanOut = 4;

constexpr int kEverybody = 1 << 30;

thread_local bool is_in_task = false;

template <class Condition>
bool spin_until(const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; i++) {
            if (condition()) return true;
            pause_core();
        }
    } while (std::chrono::steady_clock::now() < end);
    return condition();
}

// noexcept: an exception must not leave a task unreported, and there is nobody to give it to.
void run_task(Work& work, int phase, int64_t task) noexcept {
    work.run(phase, task);
}

}  // namespace

std::shared_ptr<Job> JobQueue::make(Work* work, std::unique_ptr<Work> owned, Job::Seat seat) {
    Job* blank = nullptr;
    {
        const std::lock_guard<std::mutex> lock(recycled_mutex_);
        if (!recycled_.empty()) {
            blank = recycled_.back();
            recycled_.pop_back();
        }
    }
    if (blank == nullptr) blank = new Job;
    std::shared_ptr<Job> job(blank, [this](Job* unused) { recycle(unused); });
    job->work = work;
    job->owned = std::move(owned);
    job->phases.clear();
    job->phase = 0;
    const int phases = work->phases();
    if (phases < 0) throw std::invalid_argument("work has " + std::to_string(phases) + " phases");
    for (int phase = 0; phase < phases; phase++) {
        const int64_t tasks = work->tasks(phase);
        if (tasks < 0) {
            throw std::invalid_argument("phase " + std::to_string(phase) + " has " + std::to_string(tasks) + " tasks");
        }
        if (tasks > 0) job->phases.push_back({phase, tasks});
    }
    if (job->phases.empty()) job->owned.reset();
    job->seat.store(seat, std::memory_order_relaxed);
    job->done.store(job->phases.empty(), std::memory_order_release);
    return job;
}

void JobQueue::recycle(Job* job) {
    job->owned.reset();
    const std::lock_guard<std::mutex> lock(recycled_mutex_);
    recycled_.push_back(job);
}

void JobQueue::push(std::shared_ptr<Job> job) {
    queue_.push_back(std::move(job));
    show();
}

void JobQueue::show() {
    for (size_t i = 0; i < std::size(window_); i++) {
        Job* job = i < queue_.size() ? queue_[i].get() : nullptr;
        // Workers have this in their caches.
        if (window_[i].load(std::memory_order_relaxed) != job) window_[i].store(job, std::memory_order_release);
        if (job == nullptr) break;
    }
}

// Makes the tasks of the job's current phase available.
void JobQueue::open(Job& job) {
    const int64_t tasks = job.phases[job.phase].tasks;
    int64_t present = job.seat.load(std::memory_order_relaxed) == Job::kCaller ? 1 : 0;
    job.unfinished.store(tasks, std::memory_order_relaxed);
    job.unclaimed.store(tasks);
    // From here on others may have finished the job, and have it in use for other work.
    if (closing_.load()) job.unclaimed.store(0);
    epoch_.fetch_add(1);
    // Beside another job those awake may be busy with it; with this one alone they are about to look here.
    if (window_[1].load(std::memory_order_relaxed) == nullptr) present += workers_.load() - sleepers_.load();
    wake_workers(tasks - present);
    wake_waiting(job);
}

void JobQueue::finish(Job& job) {
    std::shared_ptr<Job> kept;
    bool more;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto place =
            std::find_if(queue_.begin(), queue_.end(), [&](const auto& queued) { return queued.get() == &job; });
        kept = std::move(*place);
        queue_.erase(place);
        show();
        more = !queue_.empty();
    }
    // Before anyone can know: what the work refers to may go as soon as its job is done.
    job.owned.reset();
    job.done.store(true);
    wake_waiting(job);
    if (more) {
        // One who was looking may have missed a job that moved up, and the last in sight may have come into it now.
        epoch_.fetch_add(1);
        wake_workers(kEverybody);
    }
}

// Runs tasks of the job until none is to be had. With `seen`, only until epoch_ differs from it, for then there may be
// tasks of an older job.
void JobQueue::take_part(Job& job, const uint32_t* seen) noexcept {
    is_in_task = true;
    for (;;) {
        int64_t finished = 0;
        // Asking in vain only where it looks worthwhile keeps the line shared among those who wait.
        while (job.unclaimed.load(std::memory_order_relaxed) > 0) {
            const int64_t unclaimed = job.unclaimed.fetch_sub(1, std::memory_order_acquire);
            if (unclaimed <= 0) break;
            const Job::Phase phase = job.phases[job.phase];
            run_task(*job.work, phase.number, phase.tasks - unclaimed);
            finished++;
            if (seen != nullptr && epoch_.load(std::memory_order_relaxed) != *seen) break;
        }
        if (finished == 0) break;
        if (job.unfinished.fetch_sub(finished, std::memory_order_acq_rel) != finished) break;
        if (job.phase + 1 == job.phases.size()) {
            finish(job);
            break;
        }
        job.phase++;
        open(job);
    }
    is_in_task = false;
}

bool JobQueue::help(uint32_t seen, bool alone, bool woken) {
    for (size_t i = 0; i < std::size(window_); i++) {
        Job* job = window_[i].load(std::memory_order_acquire);
        if (job == nullptr) return false;
        const int64_t unclaimed = job->unclaimed.load(std::memory_order_acquire);
        if (unclaimed <= 0) continue;
        if (alone) {
            Job::Seat seat = Job::kFree;
            if (!job->seat.compare_exchange_strong(seat, Job::kWorker) && seat != Job::kWorker) continue;
        }
        if (woken) wake_workers(unclaimed - 1);
        take_part(*job, i == 0 ? nullptr : &seen);
        return true;
    }
    return false;
}

void JobQueue::pass_time(uint32_t seen) {
    bool (*const pastime)() = pastime_.load();
    if (pastime == nullptr) return;
    while (epoch_.load(std::memory_order_relaxed) == seen && pastime()) {
        // Whoever else wants this core has something better to do with it.
        std::this_thread::yield();
    }
}

void JobQueue::work(bool alone) {
    workers_.fetch_add(1);
    bool woken = false;
    for (;;) {
        const uint32_t seen = epoch_.load();
        if (leave_.load()) break;
        const bool found = help(seen, alone, std::exchange(woken, false));
        if (!found) pass_time(seen);
        if (found || spin_until([&] { return epoch_.load(std::memory_order_relaxed) != seen; })) continue;
        sleepers_.fetch_add(1);
        if (epoch_.load() == seen) {
            futex_wait(&epoch_, seen);
            woken = true;
        }
        sleepers_.fetch_sub(1);
    }
    workers_.fetch_sub(1);
}

void JobQueue::release_workers() {
    leave_.store(true);
    epoch_.fetch_add(1);
    futex_wake(&epoch_, kEverybody);
}

void JobQueue::wake_workers(int64_t wanted) {
    const int64_t count = std::min<int64_t>({wanted, sleepers_.load(), kFanOut});
    if (count > 0) futex_wake(&epoch_, static_cast<int>(count));
}

void JobQueue::wake_waiting(Job& job) {
    if (job.sleeping.load() == 0) return;
    job.word.fetch_add(1);
    futex_wake(&job.word, kEverybody);
}

void JobQueue::wait(Job& job, bool takes_part) {
    for (;;) {
        if (takes_part) {
            callers_.fetch_add(1);
            take_part(job, nullptr);
            callers_.fetch_sub(1);
        }
        if (job.done.load(std::memory_order_acquire)) return;
        if (closing_.load()) give_up();
        const auto changed = [&] {
            return job.done.load(std::memory_order_relaxed) || job.unclaimed.load(std::memory_order_relaxed) > 0;
        };
        if (takes_part && spin_until(changed)) continue;
        const uint32_t seen = job.word.load();
        job.sleeping.fetch_add(1);
        if (!job.done.load() && !(takes_part && job.unclaimed.load() > 0) && !closing_.load()) {
            futex_wait(&job.word, seen);
        }
        job.sleeping.fetch_sub(1);
    }
}

void JobQueue::run_here(Work& work) {
    const bool nested = std::exchange(is_in_task, true);
    callers_.fetch_add(1);
    bool stopped = false;
    const int phases = work.phases();
    for (int phase = 0; phase < phases && !stopped; phase++) {
        const int64_t tasks = work.tasks(phase);
        for (int64_t task = 0; task < tasks; task++) {
            // What a task runs is part of it, and a task that has begun is always finished.
            stopped = !nested && closing_.load();
            if (stopped) break;
            run_task(work, phase, task);
        }
    }
    callers_.fetch_sub(1);
    is_in_task = nested;
    if (stopped) give_up();
}

void JobQueue::close() {
    closing_.store(true);
    for (const std::shared_ptr<Job>& job : queue_) {
        job->unclaimed.store(0);
        wake_waiting(*job);
    }
}

void JobQueue::drain() {
    while (callers_.load() > 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
    drained_.store(true);
}

void JobQueue::give_up() {
    // Others may still be within a task of work that the caller is about to destroy.
    while (!drained_.load()) std::this_thread::sleep_for(std::chrono::microseconds(100));
    throw PoolError("the process is exiting, and the compute threads were stopped before the work was done");
}

bool JobQueue::in_task() {
    return is_in_task;
}

void JobQueue::lock_for_fork() {
    mutex_.lock();
    recycled_mutex_.lock();
}

void JobQueue::unlock_after_fork() {
    recycled_mutex_.unlock();
    mutex_.unlock();
}

}  // namespace moert
