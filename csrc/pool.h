// The threads that compute.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "affinity.h"

namespace moert {

constexpr int kMaxPoolThreads = 1024;

// A piece of work in phases: all tasks of a phase may run at once, and each phase starts when the one before is done.
// Submitted work is destroyed by the thread that finishes it, which may be any, before its job is done.
class Work {
  public:
    virtual ~Work() = default;
    virtual int phases() const = 0;
    virtual int64_t tasks(int phase) const = 0;     // may be 0; does not change once the work is submitted
    virtual void run(int phase, int64_t task) = 0;  // must not throw: that ends the process
};

class Job;

// The threads cannot be had: this is a fork of the process that started them, the process is exiting, the system gives
// no more threads, or jobs are running where none may.
class PoolError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The pool is one for the process; its workers start when work first needs them. Of n threads, n - 1 are workers and
// the last is whoever waits; a pool of one thread has a worker too, which runs what nobody waits for.
//
// All of these may be called from any thread. They throw PoolError, and std::invalid_argument for numbers that cannot
// be (a negative count, MOERT_THREADS=many).

// Returns at once. The workers start jobs in the order of their submission; a worker that finds no task left in one
// goes on with the next one. Fine within a task.
std::shared_ptr<Job> submit(std::unique_ptr<Work> work);

bool ready(const Job& job);

// Blocks until the job is done; the calling thread takes part in it, and in no other job, unless the job has as many
// participants as the pool has threads. Refused within a task, where it could wait for itself.
void wait(Job& job);

// submit and wait, for work that the caller keeps; it is done when this returns, and no thread touches it afterwards.
// Within a task it runs on the calling thread alone.
void run(Work& work);

// All of it on the calling thread, without the pool.
void run_alone(Work& work);

struct PoolInfo {
    int threads = 0;
    int workers = 0;  // started by now
    std::string why;  // what decided the number of threads
    CpuLimits limits;
};

PoolInfo pool_info();

// What set_threads asked for, else MOERT_THREADS where that is set, else default_threads of this machine. Starts none.
int threads();

// Asks for n threads, or with 0 for the default, from now on; returns what threads() now is. PoolError, and no change,
// while jobs are running or queued.
int set_threads(int n);

// What workers without a task do before they wait: pieces of a microsecond or two, until one returns false or there is
// work. It must be safe on several threads at once.
void set_pastime(bool (*piece)());

// For the end of the process: returns once no task is running and none will start. Unfinished jobs stay so, whoever
// waits for one never returns, and new work is refused. Does nothing in a fork.
void stop_threads();

}  // namespace moert
