// Checks of csrc/pool.h that need C++ or a sanitizer. Exit status 0 if all hold; each failure is a line on stderr.
//
//   c++ -std=c++17 -O1 -g -fsanitize=thread -pthread -Icsrc tests/native/pool_check.cpp csrc/pool.cpp
//       csrc/job_queue.cpp csrc/affinity.cpp -o pool_check && ./pool_check
//
// The argument is how many rounds the random part has.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"
#include "works.h"

namespace {

void phases_are_barriers() {
    for (int threads : {1, 2, 3, 8}) {
        CHECK(moert::set_threads(threads) == threads);
        for (const auto& tasks : std::vector<std::vector<int64_t>>{
                 {}, {0}, {0, 0, 0}, {1}, {5}, {0, 7, 0, 1, 0}, {1, 64, 1, 64, 1}, {1000}, {3, 2, 1, 0, 1, 2, 3}}) {
            Record kept(tasks), given(tasks);
            Strict work(tasks, &kept, microseconds(0));
            moert::run(work);
            check_complete(tasks, kept);
            const auto job = moert::submit(std::make_unique<Strict>(tasks, &given, microseconds(0)));
            moert::wait(*job);
            moert::wait(*job);
            CHECK(moert::ready(*job));
            check_complete(tasks, given);
            CHECK(given.destroyed == 1);
        }
    }
}

void workers_finish_what_nobody_waits_for() {
    for (int threads : {1, 4}) {
        moert::set_threads(threads);
        const std::vector<int64_t> tasks{20, 20};
        Record record(tasks);
        const auto job = moert::submit(std::make_unique<Strict>(tasks, &record, microseconds(10)));
        await("a job", [&] { return moert::ready(*job); });
        check_complete(tasks, record);
        Record dropped(tasks);
        moert::submit(std::make_unique<Strict>(tasks, &dropped, microseconds(10)));
        await("a dropped job", [&] { return dropped.destroyed == 1; });
        check_complete(tasks, dropped);
    }
}

void workers_start_jobs_in_order() {
    moert::set_threads(2);  // one worker
    std::mutex mutex;
    std::vector<int> order;
    std::vector<std::shared_ptr<moert::Job>> jobs;
    // More than the workers look at.
    for (int i = 0; i < 100; i++) {
        jobs.push_back(moert::submit(simple({1, 2}, [&, i](int, int64_t) {
            const std::lock_guard<std::mutex> lock(mutex);
            order.push_back(i);
        })));
    }
    await("the last job", [&] { return moert::ready(*jobs.back()); });
    CHECK(order.size() == 300);
    CHECK(std::is_sorted(order.begin(), order.end()));
}

void no_job_has_more_participants_than_threads() {
    for (int threads : {1, 2, 3}) {
        moert::set_threads(threads);
        const std::vector<int64_t> tasks{40, 40};
        Record record(tasks);
        const auto job = moert::submit(std::make_unique<Strict>(tasks, &record, microseconds(100)));
        std::vector<std::thread> waiting;
        for (int i = 0; i < 6; i++) waiting.emplace_back([&] { moert::wait(*job); });
        for (std::thread& thread : waiting) thread.join();
        check_complete(tasks, record);
        CHECK(record.most_inside <= threads);
    }
}

void a_slow_participant_holds_up_one_task_only() {
    moert::set_threads(4);
    const auto caller = std::this_thread::get_id();
    std::atomic<int> slow{0}, fast{0};
    Simple work({60}, [&](int, int64_t) {
        if (std::this_thread::get_id() != caller) {
            std::this_thread::sleep_for(milliseconds(1));
            fast++;
        } else {
            slow++;
            // Asleep, not computing, so that it takes no core from the others; until they have done all the rest.
            const auto patience = Clock::now() + std::chrono::seconds(20);
            while (fast < 59 && Clock::now() < patience) std::this_thread::sleep_for(milliseconds(1));
        }
    });
    moert::run(work);
    CHECK(slow <= 1);
    CHECK(slow + fast == 60);
}

void tasks_may_compute() {
    for (int threads : {1, 2, 4}) {
        moert::set_threads(threads);
        std::atomic<int> inner{0}, elsewhere{0}, refused{0};
        std::atomic<bool> go{false};
        std::mutex mutex;
        std::vector<std::shared_ptr<moert::Job>> jobs;
        Simple work({8, 8}, [&](int, int64_t) {
            const auto self = std::this_thread::get_id();
            Simple nested({3, 0, 2}, [&](int, int64_t) {
                inner++;
                elsewhere += std::this_thread::get_id() != self;
                std::this_thread::sleep_for(microseconds(200));
            });
            moert::run(nested);
            const auto job = moert::submit(simple({2}, [&](int, int64_t) { await("go", [&] { return go.load(); }); }));
            refused += throws<moert::PoolError>([&] { moert::wait(*job); });
            const std::lock_guard<std::mutex> lock(mutex);
            jobs.push_back(job);
        });
        moert::run(work);
        CHECK(inner == 16 * 5);
        CHECK(elsewhere == 0);
        CHECK(refused == 16);
        go = true;
        for (const auto& job : jobs) moert::wait(*job);
    }
}

// A task of a phase of `count` tasks that are done only when all of them have begun, each on a thread of its own.
void meet(std::atomic<int>& begun, int count) {
    begun++;
    await("the others", [&] { return begun >= count; });
}

void who_sleeps_at_a_barrier_is_woken() {
    moert::set_threads(2);
    const auto caller = std::this_thread::get_id();
    for (const bool caller_sleeps : {true, false}) {
        std::atomic<int> first{0}, second{0};
        Simple work({2, 2}, [&](int phase, int64_t) {
            if (phase == 0) {
                meet(first, 2);
                if ((std::this_thread::get_id() == caller) != caller_sleeps)
                    std::this_thread::sleep_for(milliseconds(10));
            } else {
                meet(second, 2);
            }
        });
        moert::run(work);
    }
}

void a_job_that_comes_into_sight_wakes_threads() {
    constexpr int kInSight = 32;
    moert::set_threads(kInSight + 6);
    std::atomic<int> begun{0}, released{0}, met{0};
    std::vector<std::shared_ptr<moert::Job>> jobs;
    for (int i = 0; i < kInSight; i++) {
        jobs.push_back(moert::submit(simple({1}, [&, i](int, int64_t) {
            begun++;
            await("release", [&] { return released > i; });
        })));
    }
    await("all in sight", [&] { return begun == kInSight; });
    const auto next = moert::submit(simple({2}, [&](int, int64_t) { meet(met, 2); }));
    std::this_thread::sleep_for(milliseconds(20));
    CHECK(met == 0);
    released = 1;
    await("the next job", [&] { return moert::ready(*next); });
    released = kInSight;
    for (const auto& job : jobs) moert::wait(*job);
}

void workers_return_to_an_older_job() {
    moert::set_threads(3);
    std::atomic<int> met{0}, later{0}, later_begun{0};
    std::atomic<bool> go{false};
    const auto older = moert::submit(simple({1, 2}, [&](int phase, int64_t) {
        if (phase == 0) {
            await("the later job", [&] { return later_begun > 0; });
        } else {
            meet(met, 2);
        }
    }));
    const auto newer = moert::submit(simple({5000}, [&](int, int64_t) {
        later_begun++;
        if (!go) std::this_thread::sleep_for(milliseconds(1));
        later++;
    }));
    await("the older job", [&] { return moert::ready(*older); });
    CHECK(later < 2500);
    go = true;
    moert::wait(*newer);
}

void size_changes_only_between_jobs() {
    moert::set_threads(3);
    CHECK(moert::threads() == 3);
    std::atomic<bool> go{false};
    const auto job = moert::submit(simple({3}, [&](int, int64_t) {
        while (!go) std::this_thread::sleep_for(milliseconds(1));
    }));
    CHECK(throws<moert::PoolError>([] { moert::set_threads(2); }));
    CHECK(moert::threads() == 3);
    go = true;
    moert::wait(*job);
    CHECK(moert::pool_info().workers == 2);
    CHECK(moert::set_threads(1) == 1);
    CHECK(moert::pool_info().workers == 0);
    CHECK(throws<std::invalid_argument>([] { moert::set_threads(-1); }));
    CHECK(throws<std::invalid_argument>([] { moert::set_threads(moert::kMaxPoolThreads + 1); }));
    CHECK(throws<std::invalid_argument>([] { moert::submit(simple({2, -1}, [](int, int64_t) {})); }));
    CHECK(moert::set_threads(0) == moert::threads());
    for (int i = 0; i < 50; i++) {
        // Right after a run there is nothing left that would keep the size from changing.
        moert::set_threads(1 + i % 5);
        std::atomic<int> count{0};
        Simple work({50}, [&](int, int64_t) { count++; });
        moert::run(work);
        CHECK(count == 50);
    }
}

void workers_block_signals_and_have_names() {
    moert::set_threads(3);
    const auto caller = std::this_thread::get_id();
    std::atomic<int> seen{0};
    Simple work({30}, [&](int, int64_t) {
        std::this_thread::sleep_for(milliseconds(1));
        if (std::this_thread::get_id() == caller) return;
        sigset_t blocked;
        pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
        char name[16] = "";
        pthread_getname_np(pthread_self(), name, sizeof name);
        CHECK(sigismember(&blocked, SIGINT) == 1 && sigismember(&blocked, SIGTERM) == 1);
        CHECK(std::string(name).compare(0, 10, "moert-cpu-") == 0);
        seen++;
    });
    moert::run(work);
    CHECK(seen > 0);
    sigset_t blocked;
    pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
    CHECK(sigismember(&blocked, SIGINT) == 0);
}

// Gaps of all lengths around the time after which idle threads go to sleep.
void nobody_sleeps_through(int rounds) {
    std::mt19937 random(7);
    for (int threads : {1, 2, 4}) {
        moert::set_threads(threads);
        for (int round = 0; round < rounds; round++) {
            const std::vector<int64_t> tasks{1 + static_cast<int64_t>(random() % 8), 2, 1, 5};
            Record record(tasks);
            Strict work(tasks, &record, microseconds(random() % 4 == 0 ? random() % 120 : 0));
            moert::run(work);
            check_complete(tasks, record);
            busy(microseconds(random() % 100));
            // Nobody but a worker can do this.
            Record lonely(tasks);
            const auto job = moert::submit(std::make_unique<Strict>(tasks, &lonely, microseconds(0)));
            await("a worker", [&] { return moert::ready(*job); });
            check_complete(tasks, lonely);
        }
    }
}

void many_threads_submit(int rounds) {
    for (int threads : {1, 2, 5}) {
        moert::set_threads(threads);
        std::vector<std::thread> submitters;
        std::mutex mutex;
        std::vector<std::shared_ptr<moert::Job>> shared;
        for (unsigned seed = 0; seed < 6; seed++) {
            submitters.emplace_back([&, seed] {
                std::mt19937 random(seed);
                std::vector<std::unique_ptr<Record>> records;
                std::vector<std::vector<int64_t>> all_tasks;
                std::vector<std::shared_ptr<moert::Job>> jobs;
                for (int round = 0; round < rounds; round++) {
                    all_tasks.push_back(random_tasks(random));
                    records.push_back(std::make_unique<Record>(all_tasks.back()));
                    const microseconds time(random() % 8 == 0 ? random() % 60 : 0);
                    auto work = std::make_unique<Strict>(all_tasks.back(), records.back().get(), time);
                    switch (random() % 4) {
                        case 0:
                            moert::run(*work);
                            check_complete(all_tasks.back(), *records.back());
                            break;
                        case 1:
                            moert::wait(*moert::submit(std::move(work)));
                            check_complete(all_tasks.back(), *records.back());
                            break;
                        case 2:
                            moert::submit(std::move(work));
                            break;
                        default: {
                            jobs.push_back(moert::submit(std::move(work)));
                            const std::lock_guard<std::mutex> lock(mutex);
                            shared.push_back(jobs.back());
                        }
                    }
                    if (random() % 16 == 0) {
                        std::shared_ptr<moert::Job> other;
                        {
                            const std::lock_guard<std::mutex> lock(mutex);
                            if (!shared.empty()) std::swap(other, shared[random() % shared.size()]);
                        }
                        if (other != nullptr) moert::wait(*other);
                    }
                }
                while (!jobs.empty()) {
                    moert::wait(*jobs.back());
                    jobs.pop_back();
                }
                {
                    const std::lock_guard<std::mutex> lock(mutex);
                    shared.clear();
                }
                for (const auto& record : records) {
                    await("every job", [&] { return record->destroyed == 1; });
                }
                for (size_t i = 0; i < records.size(); i++) check_complete(all_tasks[i], *records[i]);
            });
        }
        for (std::thread& submitter : submitters) submitter.join();
    }
}

void nodes_get_their_share() {
    using moert::NumaNode;
    using moert::spread_over_nodes;
    CHECK(spread_over_nodes({NumaNode{{0, 1}, 2}}, 3) == std::vector<int>({0, 0, 0}));
    CHECK(spread_over_nodes({NumaNode{{0, 1}, 2}, NumaNode{{2, 3}, 2}}, 5) == std::vector<int>({0, 1, 0, 1, 0}));
    for (int count = 0; count < 200; count++) {
        const std::vector<int> cores{24, 8, 1, 15};
        std::vector<NumaNode> nodes;
        for (int n : cores) nodes.push_back({{}, n});
        std::vector<int> given(cores.size());
        for (int node : spread_over_nodes(nodes, count)) given[static_cast<size_t>(node)]++;
        int sum = 0;
        for (size_t i = 0; i < cores.size(); i++) {
            sum += given[i];
            // As many threads as cores give each core one, and no node ever has more than its share, rounded up.
            CHECK(given[i] * 48 < (count + 3) * cores[i] + 48);
            if (count == 48) CHECK(given[i] == cores[i]);
        }
        CHECK(sum == count);
    }
    const std::vector<int> all = moert::allowed_cpus();
    std::thread([&] {
        CHECK(moert::bind_thread({all.back()}));
        CHECK(moert::allowed_cpus() == std::vector<int>{all.back()});
        CHECK(!moert::bind_thread({}));
    }).join();
    CHECK(moert::allowed_cpus() == all);
}

void stopping_abandons_what_has_not_begun() {
    moert::set_threads(2);
    std::atomic<int> running{0}, began{0}, callers{0}, refused{0};
    const auto task = [&](int, int64_t) {
        began++;
        running++;
        std::this_thread::sleep_for(milliseconds(5));
        running--;
    };
    const auto long_task = [&](int, int64_t) {
        callers++;
        running++;
        std::this_thread::sleep_for(milliseconds(200));
        running--;
    };
    std::vector<std::shared_ptr<moert::Job>> jobs;
    for (int i = 0; i < 50; i++) jobs.push_back(moert::submit(simple({1000, 1000}, task)));
    std::vector<std::thread> waiting;
    for (int i = 0; i < 2; i++) {
        waiting.emplace_back([&] { refused += throws<moert::PoolError>([&] { moert::wait(*jobs[0]); }); });
    }
    waiting.emplace_back([&] {
        Simple work({100}, task);
        refused += throws<moert::PoolError>([&] { moert::run(work); });
        CHECK(running == 0);
    });
    waiting.emplace_back([&] {
        Simple work({1, 1, 1, 1, 1}, long_task);  // nothing to share: stays on its thread
        refused += throws<moert::PoolError>([&] { moert::run(work); });
    });
    await("all to begin", [&] { return began >= 3 && callers == 1; });
    moert::stop_threads();
    CHECK(running == 0);
    const int before = began;
    for (std::thread& thread : waiting) thread.join();
    CHECK(refused == 4);
    CHECK(!moert::ready(*jobs.back()));
    Simple work({2}, task);
    CHECK(throws<moert::PoolError>([&] { moert::run(work); }));
    CHECK(throws<moert::PoolError>([&] { moert::submit(simple({2}, task)); }));
    CHECK(throws<moert::PoolError>([&] { moert::wait(*jobs.back()); }));
    CHECK(throws<moert::PoolError>([] { moert::set_threads(3); }));
    moert::stop_threads();
    CHECK(began == before && callers == 1);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    unsetenv("MOERT_THREADS");
    nodes_get_their_share();
    phases_are_barriers();
    workers_finish_what_nobody_waits_for();
    workers_start_jobs_in_order();
    no_job_has_more_participants_than_threads();
    a_slow_participant_holds_up_one_task_only();
    tasks_may_compute();
    who_sleeps_at_a_barrier_is_woken();
    a_job_that_comes_into_sight_wakes_threads();
    workers_return_to_an_older_job();
    size_changes_only_between_jobs();
    workers_block_signals_and_have_names();
    nobody_sleeps_through(rounds);
    many_threads_submit(rounds);
    stopping_abandons_what_has_not_begun();
    if (failures == 0) std::puts("all hold");
    return failures == 0 ? 0 : 1;
}
