#include "record.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <limits>

namespace moert {
namespace {

FileIdentity identity_of(const struct stat& status) {
    return {static_cast<uint64_t>(status.st_dev), static_cast<uint64_t>(status.st_ino),
            static_cast<int64_t>(status.st_size),
            static_cast<int64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + status.st_mtim.tv_nsec};
}

}  // namespace

bool operator==(const FileIdentity& a, const FileIdentity& b) {
    return a.device == b.device && a.inode == b.inode && a.size == b.size && a.mtime_ns == b.mtime_ns;
}

// Chunks of about the same size: a record a block longer than a few of them ends in no call for one block.
std::vector<Chunk> cut(const Part& part, size_t number) {
    const size_t blocks = part.window_bytes / kBlockBytes;
    const size_t count = std::max<size_t>(1, (part.window_bytes + kChunkBytes / 2) / kChunkBytes);
    std::vector<Chunk> chunks;
    chunks.reserve(count);
    for (size_t i = 0; i < count; i++) {
        const size_t begin = blocks * i / count * kBlockBytes, end = blocks * (i + 1) / count * kBlockBytes;
        chunks.push_back({number, begin, end - begin, std::min(end, part.needed_bytes) - begin});
    }
    return chunks;
}

bool read_chunk(ReadCall call, const Chunk& chunk, const Part& part, Failure* failure) {
    const uint64_t offset = part.offset + chunk.begin;
    uint8_t* destination = part.destination + chunk.begin;
    size_t got = 0;
    while (got < chunk.needed) {
        const ssize_t count = call(part.fd, destination + got, chunk.nbytes - got, static_cast<off_t>(offset + got));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) {
            *failure = {chunk.part, offset + got, errno};
            return false;
        }
        size_t reached = got + static_cast<size_t>(count);
        // A direct read resumes at a block's start only; what was read of the block before is read again.
        if (reached < chunk.needed) reached -= reached % kBlockBytes;
        if (reached <= got && reached < chunk.needed) {
            *failure = {chunk.part, offset + got, 0};
            return false;
        }
        got = reached;
    }
    return true;
}

bool unchanged(const std::vector<Part>& parts, Failure* failure) {
    for (size_t i = 0; i < parts.size(); i++) {
        const auto same = [&](const Part& other) { return other.fd == parts[i].fd; };
        const auto here = parts.begin() + static_cast<ptrdiff_t>(i);
        if (std::find_if(parts.begin(), here, same) != here) continue;
        struct stat status;
        const bool failed = fstat(parts[i].fd, &status) != 0;
        if (failed || !(identity_of(status) == parts[i].identity)) {
            *failure = {i, parts[i].offset, failed ? errno : 0};
            return false;
        }
    }
    return true;
}

bool Outcome::wait(std::chrono::nanoseconds limit) {
    constexpr auto under_way = static_cast<uint32_t>(ReadState::kUnderWay);
    sleeping_.fetch_add(1);
    if (word_.load() == under_way) futex_wait(&word_, under_way, limit);
    sleeping_.fetch_sub(1);
    return word_.load(std::memory_order_acquire) != under_way;
}

void Outcome::settle(ReadState state) {
    word_.store(static_cast<uint32_t>(state));
    if (sleeping_.load() > 0) futex_wake(&word_, std::numeric_limits<int>::max());
}

}  // namespace moert
