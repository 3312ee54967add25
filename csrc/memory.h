#pragma once

#include <cstddef>
#include <cstdint>

namespace moert {

constexpr size_t kHugePage = size_t{2} << 20;

// Gives every page of the range its memory now, keeping what the pages hold. Returns 0, or the errno the kernel refused
// with; *populated says whether MADV_POPULATE_WRITE did it (else each page was touched).
int prefault(uint8_t* address, size_t nbytes, int threads, bool* populated);

// Reads the range `repeats` times, split over `threads`; returns the seconds from the common start to the last finish.
double stream_read(const uint8_t* address, size_t nbytes, int threads, int repeats);

}  // namespace moert
