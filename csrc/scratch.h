// Working memory of a step, kept between steps so that its pages stay mapped.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moert {

class Scratch {
  public:
    // At least `nbytes`, 64-byte aligned, uninitialised. Throws std::bad_alloc.
    explicit Scratch(size_t nbytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    uint8_t* data() const { return data_; }

  private:
    uint8_t* data_;
    size_t nbytes_;
};

// Hands out places in scratch memory, one behind the other.
class ScratchLayout {
  public:
    int64_t nbytes() const { return nbytes_; }

  protected:
    // Where the next `bytes` are, 64-byte aligned.
    int64_t take(int64_t bytes) {
        const int64_t begin = nbytes_;
        nbytes_ += (bytes + 63) / 64 * 64;
        return begin;
    }

  private:
    int64_t nbytes_ = 0;
};

// Buffers that each thread has one of.
enum class Buffer : int { kRows, kPanel };

constexpr int kBuffers = 2;

// The calling thread's own buffer of that kind, 64-byte aligned, of at least `nbytes`; valid until it asks again.
// Throws std::bad_alloc.
uint8_t* thread_buffer(Buffer kind, size_t nbytes);

inline float* thread_floats(size_t count) {
    return reinterpret_cast<float*>(thread_buffer(Buffer::kRows, count * sizeof(float)));
}

}  // namespace moert
