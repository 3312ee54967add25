// A record on its way from files into memory: what there is to read, in chunks, and how far it has got.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "futex.h"

namespace moert {

// O_DIRECT wants offsets, lengths and addresses in multiples of it.
constexpr size_t kBlockBytes = 4096;

// Small enough that the lanes share one record and the next one follows soon, large enough that the system call and the
// wake-up are nothing beside it.
constexpr size_t kChunkBytes = size_t{1} << 20;

// What tells one state of a file from another.
struct FileIdentity {
    uint64_t device = 0, inode = 0;
    int64_t size = 0, mtime_ns = 0;
};

bool operator==(const FileIdentity& a, const FileIdentity& b);

// `window_bytes` at `offset` of a file, both multiples of kBlockBytes. At the file's end fewer bytes come, but no fewer
// than `needed_bytes`, which reach into the last block. The caller keeps the file open and the memory there.
struct Part {
    int fd = -1;
    FileIdentity identity;
    uint64_t offset = 0;
    size_t window_bytes = 0, needed_bytes = 0;
    uint8_t* destination = nullptr;
};

// One system call's share of a part: what begins `begin` bytes after its beginning.
struct Chunk {
    size_t part, begin;
    size_t nbytes, needed;
};

std::vector<Chunk> cut(const Part& part, size_t number);

// As pread.
using ReadCall = ssize_t (*)(int fd, void* destination, size_t nbytes, off_t offset);

struct Failure {
    size_t part;
    uint64_t offset;
    int error;  // an errno; 0: the file ended before the record did, or is no longer the one that was opened
};

// True with all of the chunk's needed bytes there; else `failure` says where it stopped.
bool read_chunk(ReadCall call, const Chunk& chunk, const Part& part, Failure* failure);

// Of all files, now. The failure names the first part of the first one that is not as it was.
bool unchanged(const std::vector<Part>& parts, Failure* failure);

enum class ReadState : uint32_t {
    kUnderWay,
    kWhole,      // every byte is there
    kFailed,     // not every byte is there
    kCancelled,  // not begun, or given up
    kClosed,     // not begun, for the reader was closed
};

// Set once, for good; any thread may look, or wait for it.
class Outcome {
  public:
    ReadState state() const { return static_cast<ReadState>(word_.load(std::memory_order_acquire)); }

    // Returns early now and then; false where nothing is settled yet.
    bool wait(std::chrono::nanoseconds limit);

    void settle(ReadState state);

  private:
    FutexWord word_{static_cast<uint32_t>(ReadState::kUnderWay)};
    std::atomic<int> sleeping_{0};
};

}  // namespace moert
