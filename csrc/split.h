// How the rows of weights are shared out over threads.
#pragma once

#include <cstdint>
#include <vector>

namespace moert {

constexpr int64_t kMostRows = 1024;  // of a task

struct Rows {
    int64_t part, begin, count;
};

// Cuts the rows of `parts` weights, of `rows` each, into tasks of at most `most` rows (a multiple of 32, up to
// kMostRows), all but the last of a weight a multiple of 32. The first tasks are long, as a leap to other rows costs
// about as much as reading 30 KB; the last are short, so that no thread waits long for another one's last task.
std::vector<Rows> share_out(int64_t parts, int64_t rows, int64_t most, int threads);

// The same for weights of different numbers of rows.
std::vector<Rows> share_out(const std::vector<int64_t>& rows, int64_t most, int threads);

}  // namespace moert
