// Checks of csrc/split.h: every row is in one task, and the last tasks are short, so that a slow core holds up little.
// Exit status 0 if all hold; each failure is a line on stderr.
#include "split.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

int failures = 0;

#define CHECK(condition)                                            \
    do {                                                            \
        if (!(condition)) {                                         \
            std::fprintf(stderr, "%d: %s\n", __LINE__, #condition); \
            ++failures;                                             \
        }                                                           \
    } while (false)

constexpr int64_t kShort = 96;

void every_row_is_in_one_task(const std::vector<int64_t>& rows, int64_t most, int threads) {
    size_t part = 0;
    int64_t next = 0;
    for (const moert::Rows& task : moert::share_out(rows, most, threads)) {
        while (part < rows.size() && next == rows[part]) ++part, next = 0;
        CHECK(task.part == static_cast<int64_t>(part) && task.begin == next);
        CHECK(0 < task.count && task.count <= std::max(most, kShort) + 31 && task.count <= moert::kMostRows);
        next += task.count;
        CHECK(task.count % 32 == 0 || next == rows[part]);
    }
    CHECK(part + 1 == rows.size() && next == rows.back());
}

void the_last_tasks_are_short(int64_t rows, int threads) {
    const std::vector<moert::Rows> tasks = moert::share_out(1, rows, moert::kMostRows, threads);
    CHECK(tasks.size() >= static_cast<size_t>(2 * threads));
    CHECK(tasks.back().count <= kShort);
    int64_t left = rows;
    for (const moert::Rows& task : tasks) {
        CHECK(task.count <= std::max(kShort, left / threads));
        left -= task.count;
    }
}

}  // namespace

int main() {
    for (int threads : {1, 2, 3, 8, 64})
        for (int64_t most : {128, 512, 1024})
            for (const std::vector<int64_t>& rows : std::vector<std::vector<int64_t>>{
                     {1}, {31}, {32}, {33}, {64}, {95}, {97}, {1000, 1, 64}, {1055}, {4096, 4096}, {5121, 33, 2048}})
                every_row_is_in_one_task(rows, most, threads);
    for (int threads : {2, 4, 8}) the_last_tasks_are_short(4096, threads);
    if (failures == 0) std::puts("all hold");
    return failures == 0 ? 0 : 1;
}
