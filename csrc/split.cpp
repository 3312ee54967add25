#include "split.h"

#include <algorithm>

namespace moert {
namespace {

constexpr int64_t kGrain = 32;
constexpr int64_t kFewestRows = 64;

}  // namespace

std::vector<Rows> share_out(int64_t parts, int64_t rows, int64_t most, int threads) {
    std::vector<Rows> tasks;
    int64_t left = parts * rows;
    for (int64_t part = 0; part < parts; ++part) {
        for (int64_t begin = 0; begin < rows;) {
            const int64_t share = left / (2 * threads) / kGrain * kGrain;
            int64_t count = std::min(std::clamp(share, kFewestRows, std::max(most, kFewestRows)), rows - begin);
            if (rows - begin - count < kGrain && rows - begin <= kMostRows) count = rows - begin;
            tasks.push_back({part, begin, count});
            begin += count;
            left -= count;
        }
    }
    return tasks;
}

}  // namespace moert
