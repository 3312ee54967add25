// Checks of csrc/foresight.h. Exit status 0 if all hold; each failure is a line on stderr.
#include "foresight.h"

#include <cstdio>
#include <thread>
#include <vector>

#include "pool.h"
#include "works.h"

namespace {

constexpr int64_t kPiece = 16 << 10;

int64_t bring_all() {
    int64_t pieces = 0;
    while (moert::bring_piece()) pieces++;
    return pieces;
}

// A token after token: two weights, an expert layer, one weight.
struct Model {
    std::vector<char> first = std::vector<char>(5 * kPiece), second = std::vector<char>(2 * kPiece + 1),
                      third = std::vector<char>(kPiece);
    int experts = 0;

    void read_first() const { moert::note_reading(first.data(), static_cast<int64_t>(first.size())); }
    void read_second() const { moert::note_reading(second.data(), static_cast<int64_t>(second.size())); }
    void run_experts() const { moert::note_reading(&experts, 0); }
    void read_third() const { moert::note_reading(third.data(), static_cast<int64_t>(third.size())); }

    void token() const {
        read_first();
        read_second();
        run_experts();
        read_third();
    }
};

void nothing_is_expected_before_it_has_happened() {
    const Model model;
    CHECK(bring_all() == 0);
    model.read_first();
    CHECK(bring_all() == 0);
    model.read_second();
    CHECK(bring_all() == 0);
}

void what_followed_is_expected_once() {
    const Model model;
    model.token();
    model.read_first();
    CHECK(bring_all() == 3 + 1);  // the second, and beyond the experts the third
    CHECK(bring_all() == 0);
    model.read_second();
    CHECK(bring_all() == 1 + 5);  // the third, and the first of the next token
    model.run_experts();
    CHECK(moert::bring_piece());
    model.read_third();  // what was left is forgotten
    CHECK(bring_all() == 5 + 3);
}

void no_more_than_a_share_of_the_cache() {
    const std::vector<char> small(kPiece);
    const auto* huge = reinterpret_cast<const char*>(uintptr_t{1} << 40);  // not mapped: only prefetched
    for (int i = 0; i < 2; i++) {
        moert::note_reading(small.data(), static_cast<int64_t>(small.size()));
        moert::note_reading(huge, int64_t{1} << 36);
    }
    moert::note_reading(small.data(), static_cast<int64_t>(small.size()));
    const int64_t pieces = bring_all();
    CHECK(pieces > 0);
    CHECK(pieces <= (12 << 20) / kPiece);
}

void threads_bring_each_piece_once() {
    const Model model;
    model.token();
    for (int round = 0; round < 200; round++) {
        model.read_first();
        std::atomic<int64_t> pieces{0};
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; i++) threads.emplace_back([&] { pieces += bring_all(); });
        for (std::thread& thread : threads) thread.join();
        CHECK(pieces == 4);
        model.read_second();
        model.run_experts();
        model.read_third();
    }
}

std::atomic<int> idled{0};

bool idle_three_times() {
    return ++idled % 4 != 0;
}

void idle_workers_pass_their_time() {
    moert::set_threads(2);
    moert::set_pastime(idle_three_times);
    Record record({4});
    moert::wait(*moert::submit(std::make_unique<Strict>(std::vector<int64_t>{4}, &record, microseconds(10))));
    await("a worker to be idle", [] { return idled >= 4; });
    moert::set_pastime(nullptr);
    check_complete({4}, record);
}

}  // namespace

int main() {
    nothing_is_expected_before_it_has_happened();
    what_followed_is_expected_once();
    no_more_than_a_share_of_the_cache();
    threads_bring_each_piece_once();
    idle_workers_pass_their_time();
    if (failures == 0) std::puts("all hold");
    return failures == 0 ? 0 : 1;
}
