#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "memory.h"

namespace moert {
namespace {

struct Block {
    uint8_t* data;
    size_t nbytes;
};

constexpr size_t kMostKept = 4;

// Never destroyed: threads may still compute while the process exits.
struct Kept {
    std::mutex mutex;
    std::vector<Block> blocks;
};

Kept& kept() {
    static Kept* const instance = new Kept;
    return *instance;
}

uint8_t* allocate(size_t alignment, size_t nbytes) {
    void* data = nullptr;
    if (posix_memalign(&data, alignment, nbytes) != 0) throw std::bad_alloc();
    return static_cast<uint8_t*>(data);
}

struct ThreadBuffer {
    uint8_t* data = nullptr;
    size_t nbytes = 0;
    ~ThreadBuffer() { std::free(data); }
};

}  // namespace

Scratch::Scratch(size_t nbytes) {
    {
        Kept& pool = kept();
        const std::lock_guard<std::mutex> lock(pool.mutex);
        size_t best = pool.blocks.size();
        for (size_t i = 0; i < pool.blocks.size(); ++i)
            if (pool.blocks[i].nbytes >= nbytes &&
                (best == pool.blocks.size() || pool.blocks[i].nbytes < pool.blocks[best].nbytes))
                best = i;
        if (best < pool.blocks.size()) {
            data_ = pool.blocks[best].data;
            nbytes_ = pool.blocks[best].nbytes;
            pool.blocks.erase(pool.blocks.begin() + static_cast<ptrdiff_t>(best));
            return;
        }
    }
    const bool large = nbytes >= kHugePage;
    const size_t grain = large ? kHugePage : 4096;
    nbytes_ = (nbytes + grain - 1) / grain * grain;
    data_ = allocate(grain, nbytes_);
    if (large) madvise(data_, nbytes_, MADV_HUGEPAGE);
}

Scratch::~Scratch() {
    Kept& pool = kept();
    Block worst{data_, nbytes_};
    {
        const std::lock_guard<std::mutex> lock(pool.mutex);
        pool.blocks.push_back(worst);
        if (pool.blocks.size() <= kMostKept) return;
        size_t smallest = 0;
        for (size_t i = 1; i < pool.blocks.size(); ++i)
            if (pool.blocks[i].nbytes < pool.blocks[smallest].nbytes) smallest = i;
        worst = pool.blocks[smallest];
        pool.blocks.erase(pool.blocks.begin() + static_cast<ptrdiff_t>(smallest));
    }
    std::free(worst.data);
}

uint8_t* thread_buffer(Buffer kind, size_t nbytes) {
    thread_local ThreadBuffer buffers[kBuffers];
    ThreadBuffer& buffer = buffers[static_cast<int>(kind)];
    if (buffer.nbytes < nbytes) {
        std::free(buffer.data);
        buffer.data = nullptr;
        buffer.nbytes = 0;
        buffer.data = allocate(64, nbytes);
        buffer.nbytes = nbytes;
    }
    return buffer.data;
}

}  // namespace moert
