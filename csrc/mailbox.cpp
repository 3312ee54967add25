#include "mailbox.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "pool.h"

namespace moert {
namespace {

using Clock = std::chrono::steady_clock;
using Lock = std::lock_guard<std::mutex>;

// Layers of one pass are less than this apart, and so are the passes of a token after the other on most machines.
constexpr double kSpinning_s = 3e-3;
constexpr double kNapping_s = 1.0;
constexpr std::chrono::microseconds kNap{50};
// A pass may begin long after the host has asked for it, so even then messages are looked for.
constexpr std::chrono::milliseconds kRest{50};
constexpr int kLooks = 64;

struct Registry {
    Registry() {
        pthread_atfork([] { all().mutex.lock(); }, [] { all().mutex.unlock(); }, [] { all().mutex.unlock(); });
    }
    static Registry& all();

    std::mutex mutex;
    std::vector<Mailbox*> boxes;
};

// Never destroyed, and made while the library is loaded, so that a fork never meets a half-made one.
Registry& registry = *new Registry;

Registry& Registry::all() {
    return registry;
}

double seconds_since(Clock::time_point then) {
    return std::chrono::duration<double>(Clock::now() - then).count();
}

}  // namespace

Mailbox::Mailbox(const Letters& letters) : letters_(letters) {
    const Lock lock(registry.mutex);
    registry.boxes.push_back(this);
}

Mailbox::~Mailbox() {
    close();
    const Lock lock(registry.mutex);
    registry.boxes.erase(std::find(registry.boxes.begin(), registry.boxes.end(), this));
}

void Mailbox::set_layer(size_t index, MailLayer layer) {
    const Lock lock(mutex_);
    if (index > layers_.size()) {
        throw std::invalid_argument("layer " + std::to_string(index) + " comes after " +
                                    std::to_string(layers_.size()) + " layers");
    }
    if (index == layers_.size()) layers_.emplace_back();
    layers_[index] = std::move(layer);
}

void Mailbox::arm() {
    if (in_fork()) {
        throw PoolError(
            "the thread that answers a device belongs to the process that started it and this is a fork of it; start "
            "this process by spawn");
    }
    if (closing_.load()) throw PoolError("the thread that answers a device has been stopped");
    if (!thread_.joinable()) start();
    armed_.store(true);
    word_.fetch_add(1);
    if (sleeping_.load()) futex_wake(&word_, 1);
}

void Mailbox::start() {
    // The thread inherits the mask: no signal handler of the program ever runs on it.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::string why;
    try {
        thread_ = std::thread([this] {
            pthread_setname_np(pthread_self(), "moert-mail");
            serve();
        });
    } catch (const std::system_error& error) {
        why = error.what();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!why.empty()) throw PoolError("the thread that answers a device could not be started: " + why);
}

void Mailbox::pause() {
    if (in_fork()) return;
    const Lock lock(mutex_);
    armed_.store(false);
    if (!closing_.load()) letters_.answered->store(letters_.posted->load(std::memory_order_acquire));
}

void Mailbox::close() {
    if (in_fork() || closing_.exchange(true)) return;
    word_.fetch_add(1);
    futex_wake(&word_, 1);
    if (thread_.joinable()) thread_.join();
    letters_.answered->store(kClosed, std::memory_order_release);
}

std::string Mailbox::failure() const {
    const Lock lock(failure_mutex_);
    return failure_;
}

bool Mailbox::has_message() const {
    return letters_.posted->load(std::memory_order_acquire) != letters_.answered->load(std::memory_order_relaxed);
}

void Mailbox::serve() {
    uint32_t seen = word_.load();
    Clock::time_point since = Clock::now();
    while (!closing_.load()) {
        const uint32_t now = word_.load();
        if (now != seen) since = Clock::now();
        seen = now;
        if (armed_.load() && has_message()) {
            const Lock lock(mutex_);
            if (!armed_.load()) continue;
            answer();
            since = Clock::now();
        } else {
            wait(seen, seconds_since(since));
        }
    }
}

void Mailbox::wait(uint32_t seen, double idle_s) {
    const bool armed = armed_.load();
    if (armed && idle_s < kSpinning_s) {
        for (int i = 0; i < kLooks && !has_message() && word_.load(std::memory_order_relaxed) == seen; i++)
            pause_core();
        return;
    }
    sleeping_.store(true);
    if (!armed)
        futex_wait(&word_, seen);
    else if (idle_s < kNapping_s)
        futex_wait(&word_, seen, kNap);
    else
        futex_wait(&word_, seen, kRest);
    sleeping_.store(false);
}

void Mailbox::answer() {
    const uint32_t number = letters_.posted->load(std::memory_order_acquire);
    try {
        compute();
    } catch (const std::exception& error) {
        {
            const Lock lock(failure_mutex_);
            failure_ = error.what();
        }
        letters_.failed->store(kNotComputed, std::memory_order_release);
    }
    messages_.fetch_add(1);
    letters_.answered->store(number, std::memory_order_release);
}

void Mailbox::compute() {
    const int32_t index = letters_.header[0], count = letters_.header[1];
    if (index < 0 || static_cast<size_t>(index) >= layers_.size() || count < 0 || count > letters_.most) {
        throw std::invalid_argument("a message is of " + std::to_string(count) + " experts of layer " +
                                    std::to_string(index) + ", which is none");
    }
    const MailLayer& layer = layers_[static_cast<size_t>(index)];
    std::fill_n(letters_.sums, layer.hidden, std::numeric_limits<float>::quiet_NaN());
    Step step;
    step.gate = layer.gate;
    step.number = layer.number;
    step.hidden = layer.hidden;
    step.width = layer.width;
    step.x = letters_.hidden;
    step.out = letters_.sums;
    int64_t nbytes = 0;
    for (int32_t i = 0; i < count; ++i) {
        const int32_t id = letters_.ids[i];
        if (id < 0 || static_cast<size_t>(id) >= layer.experts.size()) {
            throw std::invalid_argument("a message is of expert " + std::to_string(id) + " of layer " +
                                        std::to_string(index) + ", which has " + std::to_string(layer.experts.size()));
        }
        if (letters_.weights[i] == 0) continue;
        Group group;
        group.expert = layer.experts[static_cast<size_t>(id)];
        group.tokens = 1;
        group.weights = letters_.weights + i;
        nbytes += weight_bytes(group.expert.up) + weight_bytes(group.expert.down);
        step.groups.push_back(group);
    }
    std::unique_ptr<Work> work;
    if (!step.groups.empty()) work = make_ffn(std::move(step));
    std::fill_n(letters_.sums, layer.hidden, 0.0f);
    if (work != nullptr) run_reading(nbytes, *work);
}

void stop_mailboxes() {
    const Lock lock(registry.mutex);
    for (Mailbox* box : registry.boxes) box->close();
}

}  // namespace moert
