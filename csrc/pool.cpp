#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "job_queue.h"

namespace moert {
namespace {

class Pool {
  public:
    Pool() { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

    std::shared_ptr<Job> enqueue(Work* work, std::unique_ptr<Work> owned, Job::Seat seat);
    void wait(Job& job);
    void run(Work& work);
    PoolInfo info();
    int threads();
    int set_threads(int n);
    void stop();
    void set_pastime(bool (*piece)()) { jobs_.set_pastime(piece); }

  private:
    void refuse_if_unusable() const;
    void resolve();
    void start_workers();
    void stop_workers();

    static void before_fork();
    static void after_fork_in_parent();
    static void after_fork_in_child();

    JobQueue jobs_;  // its mutex guards all below
    std::vector<std::thread> workers_;
    int requested_ = 0;
    std::string why_;
    CpuLimits limits_;
    std::atomic<int> threads_{0};  // 0: not decided yet
    std::atomic<bool> forked_{false};
};

// Never destroyed: workers and daemon threads use it until the process is gone. Made while the library is loaded, so
// that a fork never meets a half-made one.
Pool& pool = *new Pool;

using Lock = std::lock_guard<std::mutex>;

void Pool::before_fork() {
    pool.jobs_.lock_for_fork();
}

void Pool::after_fork_in_parent() {
    pool.jobs_.unlock_after_fork();
}

void Pool::after_fork_in_child() {
    if (!pool.workers_.empty()) pool.forked_.store(true);
    pool.jobs_.forget_callers();
    pool.jobs_.unlock_after_fork();
}

void Pool::refuse_if_unusable() const {
    if (forked_.load(std::memory_order_relaxed)) {
        throw PoolError(
            "the compute threads belong to the process that started them and this is a fork of it; fork before the "
            "first computation, or start this process by spawn");
    }
    if (jobs_.closed()) {
        throw PoolError("the compute threads have been stopped because the process is exiting; compute before that");
    }
}

void Pool::resolve() {
    limits_ = cpu_limits("/", allowed_cpus());
    int count;
    const char* text = std::getenv("MOERT_THREADS");
    if (text != nullptr && *text != '\0') {
        char* end = nullptr;
        errno = 0;
        const long number = std::strtol(text, &end, 10);
        if (errno != 0 || *end != '\0' || number < 1 || number > kMaxPoolThreads) {
            throw std::invalid_argument("MOERT_THREADS is '" + std::string(text) + "', must be a number in 1.." +
                                        std::to_string(kMaxPoolThreads));
        }
        count = static_cast<int>(number);
        why_ = "MOERT_THREADS is " + std::to_string(count);
    } else {
        count = std::min(default_threads(limits_, &why_), kMaxPoolThreads);
    }
    if (requested_ > 0) {
        count = requested_;
        why_ = "set_threads asked for " + std::to_string(count);
    }
    threads_.store(count, std::memory_order_release);
}

int Pool::threads() {
    const int known = threads_.load(std::memory_order_acquire);
    if (known > 0) return known;
    const Lock lock(jobs_.mutex());
    if (threads_.load() == 0) resolve();
    return threads_.load();
}

PoolInfo Pool::info() {
    threads();
    const Lock lock(jobs_.mutex());
    return {threads_.load(), static_cast<int>(workers_.size()), why_, limits_};
}

int Pool::set_threads(int n) {
    if (n < 0 || n > kMaxPoolThreads) {
        throw std::invalid_argument(std::to_string(n) + " threads asked for, must be in 1.." +
                                    std::to_string(kMaxPoolThreads) + ", or 0 for the default");
    }
    const Lock lock(jobs_.mutex());
    refuse_if_unusable();
    if (jobs_.size() != 0) {
        throw PoolError("the number of threads cannot change while " + std::to_string(jobs_.size()) +
                        " jobs are running or queued; wait for them first");
    }
    const int before = threads_.load(), requested = std::exchange(requested_, n);
    try {
        resolve();
    } catch (...) {
        requested_ = requested;
        throw;
    }
    if (threads_.load() != before) stop_workers();
    return threads_.load();
}

void Pool::start_workers() {
    if (!workers_.empty()) return;
    if (threads_.load() == 0) resolve();
    const int threads = threads_.load(), count = std::max(1, threads - 1);
    std::vector<int> nodes;
    if (limits_.nodes.size() > 1) nodes = spread_over_nodes(limits_.nodes, count);

    // Threads inherit the mask: no signal handler of the program ever runs on a worker.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = 0;
    try {
        workers_.reserve(static_cast<size_t>(count));
        for (int i = 0; i < count; i++) {
            std::vector<int> cpus;
            if (!nodes.empty()) cpus = limits_.nodes[static_cast<size_t>(nodes[static_cast<size_t>(i)])].cpus;
            workers_.emplace_back([this, i, cpus = std::move(cpus), alone = threads == 1] {
                pthread_setname_np(pthread_self(), ("moert-cpu-" + std::to_string(i)).c_str());
                // Where the kernel refuses, the worker runs anywhere: perhaps slower, never wrong.
                if (!cpus.empty()) bind_thread(cpus);
                jobs_.work(alone);
            });
        }
    } catch (const std::system_error& error) {
        failure = error.code().value();
    } catch (const std::bad_alloc&) {
        failure = ENOMEM;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failure != 0) {
        const size_t started = workers_.size();
        stop_workers();
        throw PoolError("only " + std::to_string(started) + " of " + std::to_string(count) +
                        " compute threads could be started: " + std::strerror(failure) +
                        "; set MOERT_THREADS to fewer, or raise the limit on threads");
    }
}

// With no job left that a worker would need the mutex to finish.
void Pool::stop_workers() {
    jobs_.release_workers();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    jobs_.welcome_workers();
}

void Pool::stop() {
    std::vector<std::thread> workers;
    {
        const Lock lock(jobs_.mutex());
        if (forked_.load() || jobs_.closed()) return;
        jobs_.close();
        workers.swap(workers_);
    }
    // Without the mutex: a worker may be finishing the last task of a job.
    jobs_.release_workers();
    for (std::thread& worker : workers) worker.join();
    jobs_.drain();
}

std::shared_ptr<Job> Pool::enqueue(Work* work, std::unique_ptr<Work> owned, Job::Seat seat) {
    refuse_if_unusable();
    std::shared_ptr<Job> job = jobs_.make(work, std::move(owned), seat);
    if (ready(*job)) return job;
    {
        const Lock lock(jobs_.mutex());
        refuse_if_unusable();
        start_workers();
        jobs_.push(job);
    }
    jobs_.start(*job);
    return job;
}

void Pool::wait(Job& job) {
    if (ready(job)) return;
    refuse_if_unusable();
    if (JobQueue::in_task()) throw PoolError("a task waits for a job, perhaps its own; wait outside of tasks");
    Job::Seat seat = Job::kFree;
    jobs_.wait(job, job.seat.compare_exchange_strong(seat, Job::kCaller));
}

void Pool::run(Work& work) {
    if (JobQueue::in_task()) return jobs_.run_here(work);
    refuse_if_unusable();
    bool shared = false;
    if (threads() > 1) {
        const int phases = work.phases();
        for (int phase = 0; phase < phases; phase++) shared |= work.tasks(phase) > 1;
    }
    if (!shared) return jobs_.run_here(work);
    const std::shared_ptr<Job> job = enqueue(&work, nullptr, Job::kCaller);
    jobs_.wait(*job, true);
}

}  // namespace

void run_alone(Work& work) {
    for (int phase = 0; phase < work.phases(); ++phase)
        for (int64_t task = 0; task < work.tasks(phase); ++task) work.run(phase, task);
}

std::shared_ptr<Job> submit(std::unique_ptr<Work> work) {
    Work* const borrowed = work.get();
    return pool.enqueue(borrowed, std::move(work), Job::kFree);
}

bool ready(const Job& job) {
    return job.done.load(std::memory_order_acquire);
}

void wait(Job& job) {
    pool.wait(job);
}

void run(Work& work) {
    pool.run(work);
}

PoolInfo pool_info() {
    return pool.info();
}

int threads() {
    return pool.threads();
}

int set_threads(int n) {
    return pool.set_threads(n);
}

void set_pastime(bool (*piece)()) {
    pool.set_pastime(piece);
}

void stop_threads() {
    pool.stop();
}

}  // namespace moert
