// Checks of csrc/mailbox.h that need C++ or a sanitizer: a thread stands for the device. Exit status 0 if all hold.
//
// The argument is how many messages the random part has.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "mailbox.h"
#include "works.h"

using namespace moert;

namespace {

constexpr int64_t kHidden = 96, kWidth = 64, kExperts = 7, kMost = 4;
constexpr int kLayers = 3;

struct Layer {
    explicit Layer(unsigned seed) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal(0, 0.2f);
        up.resize(kExperts * 2 * kWidth * kHidden);
        down.resize(kExperts * kHidden * kWidth);
        for (float& number : up) number = normal(generator);
        for (float& number : down) number = normal(generator);
        of.gate.curve = Curve::kSilu;
        of.gate.gated = true;
        of.gate.gate_limit = of.gate.up_limit = of.gate.output_limit = INFINITY;
        of.hidden = kHidden;
        of.width = kWidth;
        for (int64_t i = 0; i < kExperts; i++) {
            Expert expert;
            expert.up = matrix(&up[static_cast<size_t>(i * 2 * kWidth * kHidden)], 2 * kWidth, kHidden);
            expert.down = matrix(&down[static_cast<size_t>(i * kHidden * kWidth)], kHidden, kWidth);
            of.experts.push_back(expert);
        }
    }

    static Matrix matrix(const float* numbers, int64_t n, int64_t k) {
        Matrix made;
        made.format = Format::kFp32;
        made.n = n;
        made.k = k;
        made.data = reinterpret_cast<const uint8_t*>(numbers);
        return made;
    }

    std::vector<float> up, down;
    MailLayer of;
};

// What a device has of the memory, and what it does.
struct Device {
    explicit Device(int layers = kLayers) {
        letters.posted = &posted;
        letters.answered = &answered;
        letters.failed = &failed;
        letters.header = header;
        letters.ids = ids;
        letters.weights = weights;
        letters.hidden = reinterpret_cast<const uint8_t*>(hidden.data());
        letters.sums = sums.data();
        letters.most = kMost;
        box = std::make_unique<Mailbox>(letters);
        for (int i = 0; i < layers; i++) {
            known.emplace_back(static_cast<unsigned>(i));
            box->set_layer(static_cast<size_t>(i), known.back().of);
        }
    }

    void post(int layer, const std::vector<int32_t>& experts) {
        header[0] = layer;
        header[1] = static_cast<int32_t>(experts.size());
        for (size_t i = 0; i < experts.size(); i++) {
            ids[i] = experts[i];
            weights[i] = 0.25f * static_cast<float>(i + 1);
        }
        for (float& number : hidden) number = normal(generator);
        posted.store(++number, std::memory_order_release);
    }

    bool has_answer() const { return answered.load(std::memory_order_acquire) == number; }

    std::vector<float> wanted() {
        std::vector<float> made(kHidden);
        Step step;
        const MailLayer& of = known[static_cast<size_t>(header[0])].of;
        step.gate = of.gate;
        step.hidden = kHidden;
        step.width = kWidth;
        step.x = letters.hidden;
        step.out = made.data();
        for (int32_t i = 0; i < header[1]; i++) {
            Group group;
            group.expert = of.experts[static_cast<size_t>(ids[i])];
            group.tokens = 1;
            group.weights = weights + i;
            step.groups.push_back(group);
        }
        run_alone(*make_ffn(std::move(step)));
        return made;
    }

    void check_answer() {
        await("an answer", [&] { return has_answer(); });
        const std::vector<float> right = wanted();
        CHECK(std::memcmp(sums.data(), right.data(), kHidden * sizeof(float)) == 0);
    }

    FutexWord posted{0}, answered{0}, failed{0};
    int32_t header[2] = {}, ids[kMost] = {};
    float weights[kMost] = {};
    std::vector<float> hidden = std::vector<float>(kHidden), sums = std::vector<float>(kHidden);
    uint32_t number = 0;
    std::mt19937 generator{3};
    std::normal_distribution<float> normal{0, 1};
    Letters letters;
    std::vector<Layer> known;
    std::unique_ptr<Mailbox> box;
};

void every_message_is_answered(int messages) {
    for (int threads : {1, 2, 4}) {
        set_threads(threads);
        Device device;
        std::atomic<bool> over{false};
        // Others compute beside it.
        std::thread other([&] {
            while (!over.load()) {
                const auto job = submit(simple({4, 4}, [](int, int64_t) { busy(microseconds(20)); }));
                wait(*job);
            }
        });
        for (int i = 0; i < messages; i++) {
            if (i % 7 == 0) device.box->arm();
            std::vector<int32_t> experts;
            for (int32_t id = 0; id < kExperts && experts.size() < kMost; id++)
                if (device.generator() % 2 != 0) experts.push_back(id);
            device.post(static_cast<int>(device.generator() % kLayers), experts);
            device.check_answer();
        }
        over.store(true);
        other.join();
        CHECK(device.box->messages() == static_cast<uint64_t>(messages));
        CHECK(device.failed.load() == 0 && device.box->failure().empty());
    }
    set_threads(2);
}

void late_messages_are_found() {
    Device device;
    device.box->arm();
    for (const int pause_ms : {1, 20, 1200}) {
        std::this_thread::sleep_for(milliseconds(pause_ms));
        device.post(1, {2, 5});
        device.check_answer();
    }
}

void paused_it_answers_nothing() {
    Device device;
    device.box->pause();
    device.post(0, {1});
    std::this_thread::sleep_for(milliseconds(20));
    CHECK(!device.has_answer());
    device.box->arm();
    device.check_answer();
    for (int i = 0; i < 200; i++) {
        device.box->arm();
        device.post(i % kLayers, {0, 3, 6});
        if (i % 3 == 0) std::this_thread::sleep_for(microseconds(device.generator() % 60));
        // Whether it was in time or not: once it is paused nothing is read or written.
        device.box->pause();
        CHECK(device.has_answer());
        for (float& number : device.hidden) number = 0;
        for (float& number : device.sums) number = 7;
        device.box->set_layer(0, device.known[0].of);
        std::this_thread::sleep_for(microseconds(20));
        for (const float number : device.sums) CHECK(number == 7);
    }
    device.box->arm();
    device.post(2, {4});
    device.check_answer();
}

void what_is_no_message_is_said(const char* what, int layer, const std::vector<int32_t>& experts) {
    Device device;
    device.box->arm();
    device.post(layer, experts);
    await("an answer", [&] { return device.has_answer(); });
    CHECK(device.failed.load() == kNotComputed);
    if (device.box->failure().find(what) == std::string::npos) CHECK(!"the failure says what it was");
    device.post(1, {2});
    device.check_answer();
}

void closed_it_says_so() {
    for (int i = 0; i < 30; i++) {
        Device device;
        if (i % 3 != 0) device.box->arm();
        device.post(0, {1, 2});
        if (i % 2 != 0) std::this_thread::sleep_for(microseconds(device.generator() % 300));
        if (i % 5 == 0)
            stop_mailboxes();
        else
            device.box->close();
        device.box->close();
        CHECK(device.answered.load() == kClosed);
        CHECK(throws<PoolError>([&] { device.box->arm(); }));
    }
    stop_mailboxes();
}

void a_fork_is_refused() {
    auto* device = new Device;  // not to be destroyed in the fork
    device->box->arm();
    device->post(0, {1});
    device->check_answer();
    const pid_t child = fork();
    if (child == 0) {
        bool good = throws<PoolError>([&] { device->box->arm(); });
        device->box->pause();
        stop_mailboxes();
        // One of its own works, if the threads that compute are not needed for it.
        std::_Exit(good && device->box->in_fork() ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    device->post(1, {0, 6});
    device->check_answer();
    delete device;
}

}  // namespace

int main(int count, char** arguments) {
    every_message_is_answered(count > 1 ? std::atoi(arguments[1]) : 300);
    late_messages_are_found();
    paused_it_answers_nothing();
    what_is_no_message_is_said("layer 3", 3, {1});
    what_is_no_message_is_said("expert 7 of layer 1", 1, {0, 7});
    closed_it_says_so();
    a_fork_is_refused();
    std::printf("mailbox: %d failures\n", failures.load());
    return failures.load() == 0 ? 0 : 1;
}
