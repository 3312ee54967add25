#include "foresight.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <unordered_map>

namespace moert {
namespace {

constexpr int64_t kPiece = 16 << 10;  // about a microsecond: so soon a worker sees that there is work
constexpr int64_t kLine = 64;
constexpr int64_t kMostAhead = 12 << 20;
constexpr size_t kMostRanges = 8;
constexpr int kMostSteps = 16;
constexpr size_t kMostKnown = 1 << 14;

struct Reading {
    const void* data;
    int64_t nbytes;
};

struct Range {
    std::atomic<const char*> begin{nullptr};
    std::atomic<int64_t> pieces{0};
};

std::mutex mutex;
std::unordered_map<const void*, Reading>& followers = *new std::unordered_map<const void*, Reading>;
const void* last = nullptr;

// Read without the mutex, so it may be half of one plan and half of the next. That, and memory that is gone by now,
// costs some time and nothing else: a prefetch of an address that is not mapped does nothing.
Range ranges[kMostRanges];
std::atomic<int64_t> next_piece{0}, pieces_planned{0};

// A quarter of the last cache: the weights of the work in between go through it as well.
int64_t most_ahead() {
    static const int64_t most = [] {
        int64_t cache_bytes = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
        cache_bytes = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
        return std::min(kMostAhead, cache_bytes > 0 ? cache_bytes / 4 : kMostAhead / 4);
    }();
    return most;
}

void plan_after(const Reading& reading) {
    pieces_planned.store(0, std::memory_order_relaxed);
    int64_t pieces = 0, left = most_ahead();
    size_t count = 0;
    const void* at = reading.data;
    for (int step = 0; step < kMostSteps && count < kMostRanges && left > 0; step++) {
        const auto found = followers.find(at);
        if (found == followers.end() || found->second.data == reading.data) break;
        const Reading& next = found->second;
        at = next.data;
        if (next.nbytes == 0) continue;
        const int64_t own = (std::min(next.nbytes, left) + kPiece - 1) / kPiece;
        ranges[count].begin.store(static_cast<const char*>(next.data), std::memory_order_relaxed);
        ranges[count].pieces.store(own, std::memory_order_relaxed);
        count++;
        pieces += own;
        left -= next.nbytes;
    }
    for (size_t i = count; i < kMostRanges; i++) ranges[i].pieces.store(0, std::memory_order_relaxed);
    next_piece.store(0, std::memory_order_relaxed);
    pieces_planned.store(pieces, std::memory_order_release);
}

}  // namespace

void note_reading(const void* data, int64_t nbytes) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock) return;
    const Reading reading{data, nbytes};
    if (last != nullptr) {
        if (followers.size() >= kMostKnown) followers.clear();
        followers[last] = reading;
    }
    last = data;
    plan_after(reading);
}

bool bring_piece() {
    if (next_piece.load(std::memory_order_relaxed) >= pieces_planned.load(std::memory_order_acquire)) return false;
    int64_t piece = next_piece.fetch_add(1, std::memory_order_relaxed);
    for (const Range& range : ranges) {
        const int64_t own = range.pieces.load(std::memory_order_relaxed);
        if (piece < own) {
            const char* begin = range.begin.load(std::memory_order_relaxed) + piece * kPiece;
            for (int64_t offset = 0; offset < kPiece; offset += kLine) __builtin_prefetch(begin + offset, 0, 2);
            return true;
        }
        piece -= own;
    }
    return false;
}

}  // namespace moert
