#include "split.h"

#include <algorithm>
#include <numeric>

namespace moert {
namespace {

constexpr int64_t kGrain = 32;
constexpr int64_t kFewestRows = 64;

}  // namespace

std::vector<Rows> share_out(int64_t parts, int64_t rows, int64_t most, int threads) {
    return share_out(std::vector<int64_t>(static_cast<size_t>(parts), rows), most, threads);
}

std::vector<Rows> share_out(const std::vector<int64_t>& rows, int64_t most, int threads) {
    std::vector<Rows> tasks;
    int64_t left = std::accumulate(rows.begin(), rows.end(), int64_t{0});
    for (size_t part = 0; part < rows.size(); ++part) {
        const int64_t end = rows[part];
        for (int64_t begin = 0; begin < end;) {
            const int64_t share = left * 4 / (5 * threads) / kGrain * kGrain;
            int64_t count = std::min(std::clamp(share, kFewestRows, std::max(most, kFewestRows)), end - begin);
            if (end - begin - count < kGrain && end - begin <= kMostRows) count = end - begin;
            tasks.push_back({static_cast<int64_t>(part), begin, count});
            begin += count;
            left -= count;
        }
    }
    return tasks;
}

}  // namespace moert
