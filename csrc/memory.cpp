#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace moert {
namespace {

struct Range {
    size_t begin, end;
};

// Cuts [0, nbytes) into at most `parts` ranges whose inner borders are multiples of `grain`.
std::vector<Range> split(size_t nbytes, int parts, size_t grain) {
    const size_t grains = (nbytes + grain - 1) / grain;
    const size_t count = std::max<size_t>(1, std::min<size_t>(parts, grains));
    std::vector<Range> ranges;
    for (size_t i = 0; i < count; i++) {
        // grains < 2^43 for any address space, so the product cannot overflow with a few thousand parts.
        ranges.push_back(
            {std::min(nbytes, grains * i / count * grain), std::min(nbytes, grains * (i + 1) / count * grain)});
    }
    return ranges;
}

// Runs job(i) for i in [0, count), each on its own thread; on this one where no thread is to be had.
template <class Job>
void run_parallel(size_t count, const Job& job) {
    std::vector<std::thread> threads;
    threads.reserve(count);
    size_t next = 1;
    try {
        for (; next < count; next++) threads.emplace_back(job, next);
    } catch (const std::system_error&) {
    }
    job(0);
    for (; next < count; next++) job(next);
    for (auto& thread : threads) thread.join();
}

void touch(uint8_t* address, Range range, size_t page) {
    volatile uint8_t* bytes = address;
    for (size_t i = range.begin; i < range.end; i += page) bytes[i] = bytes[i];
}

// One body for every instruction set: plain C++ that the compiler vectorises for the target of the function around it.
__attribute__((always_inline)) inline uint64_t sum_words(const uint8_t* bytes, size_t nbytes) {
    constexpr size_t lanes = 32;
    uint64_t sums[lanes] = {};
    const uint64_t* words = reinterpret_cast<const uint64_t*>(bytes);
    const size_t count = nbytes / sizeof(uint64_t);
    size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        for (size_t lane = 0; lane < lanes; lane++) sums[lane] += words[i + lane];
    }
    uint64_t total = 0;
    for (; i < count; i++) total += words[i];
    for (uint64_t sum : sums) total += sum;
    return total;
}

using SumFunction = uint64_t (*)(const uint8_t*, size_t);

uint64_t sum_portable(const uint8_t* bytes, size_t nbytes) {
    return sum_words(bytes, nbytes);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t sum_avx2(const uint8_t* bytes, size_t nbytes) {
    return sum_words(bytes, nbytes);
}
__attribute__((target("avx512f,prefer-vector-width=512"))) uint64_t sum_avx512(const uint8_t* bytes, size_t nbytes) {
    return sum_words(bytes, nbytes);
}
#endif

SumFunction best_sum() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return sum_avx512;
    if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
    return sum_portable;
}

}  // namespace

int prefault(uint8_t* address, size_t nbytes, int threads, bool* populated) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(address);
    // madvise wants whole pages; the range is rounded out, which touches no page that it does not already share.
    uint8_t* base = reinterpret_cast<uint8_t*>(start / page * page);
    const size_t length = start + nbytes - reinterpret_cast<uintptr_t>(base);
    const std::vector<Range> ranges = split(length, threads, kHugePage);

    // By its manual, madvise of nothing succeeds exactly if the kernel knows the advice (5.14 and later do).
    *populated = madvise(nullptr, 0, MADV_POPULATE_WRITE) == 0;
    if (!*populated) {
        run_parallel(ranges.size(), [&](size_t i) { touch(base, ranges[i], page); });
        return 0;
    }

    std::atomic<int> failure{0};
    run_parallel(ranges.size(), [&](size_t i) {
        const Range range = ranges[i];
        int result;
        do {
            result = madvise(base + range.begin, range.end - range.begin, MADV_POPULATE_WRITE);
        } while (result != 0 && (errno == EINTR || errno == EAGAIN));
        if (result != 0) failure.store(errno);
    });
    return failure.load();
}

double stream_read(const uint8_t* address, size_t nbytes, int threads, int repeats) {
    using Clock = std::chrono::steady_clock;
    const std::vector<Range> ranges = split(nbytes, threads, 4096);
    const SumFunction sum = best_sum();
    std::vector<Clock::time_point> started(ranges.size()), finished(ranges.size());
    std::atomic<uint64_t> sink{0};
    run_parallel(ranges.size(), [&](size_t i) {
        started[i] = Clock::now();
        uint64_t total = 0;
        for (int repeat = 0; repeat < repeats; repeat++) {
            total += sum(address + ranges[i].begin, ranges[i].end - ranges[i].begin);
            // Without it the passes are equal in the compiler's eyes and one would do.
            __asm__ volatile("" ::: "memory");
        }
        sink.fetch_add(total);
        finished[i] = Clock::now();
    });
    const auto first = *std::min_element(started.begin(), started.end());
    const auto last = *std::max_element(finished.begin(), finished.end());
    return std::chrono::duration<double>(last - first).count();
}

}  // namespace moert
