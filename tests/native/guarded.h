// Memory beside which a page lies that nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

enum class Place {
    kBeforeGuard,  // ends where the guarded page begins, so one byte read too many is a crash
    kOdd,          // begins one element after a guarded page, at an address that is a multiple of nothing larger
};

class Guarded {
  public:
    Guarded(size_t nbytes, size_t element, Place place) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t inner = (nbytes + element + page - 1) / page * page;
        length_ = inner + 2 * page;
        void* mapping = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapping == MAP_FAILED) die();
        mapping_ = static_cast<uint8_t*>(mapping);
        if (mprotect(mapping_ + page, inner, PROT_READ | PROT_WRITE) != 0) die();
        data_ = mapping_ + page + (place == Place::kOdd ? element : inner - nbytes);
    }
    ~Guarded() { munmap(mapping_, length_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    uint8_t* data() const { return data_; }
    float* floats() const { return reinterpret_cast<float*>(data_); }

  private:
    [[noreturn]] static void die() {
        std::perror("no guarded memory");
        std::exit(2);
    }

    uint8_t* mapping_;
    uint8_t* data_;
    size_t length_;
};

// A copy of some bytes, or null of none.
class GuardedCopy {
  public:
    GuardedCopy(const uint8_t* bytes, size_t nbytes, size_t element, Place place)
        : memory_(nbytes, element, place), there_(nbytes != 0) {
        if (there_) std::memcpy(memory_.data(), bytes, nbytes);
    }
    const uint8_t* data() const { return there_ ? memory_.data() : nullptr; }

  private:
    Guarded memory_;
    bool there_;
};
