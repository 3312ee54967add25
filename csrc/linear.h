// y = x W^T for a few rows of x and row-major 16-bit weights, read where they are.
#pragma once

#include <cstdint>

namespace moert {

enum class Half { kBf16, kFp16 };

// weight: [n, k] row-major, any alignment of 2 bytes. x: [t, k] fp32. y: [t, n] fp32, all of it written.
// Sums are in fp32 and in an order that depends on k and the instruction set alone: not on t, n or any address.
void linear(Half type, const uint16_t* weight, const float* x, float* y, int64_t t, int64_t n, int64_t k);

// Has `linear` run with this instruction set ("avx512", "avx2", "scalar"; null: the best there is) from now on.
// False, and no change, where the processor lacks it or there is no such name. Not to be called while `linear` runs.
bool use_isa(const char* name);

// The instruction set that `linear` runs with.
const char* isa();

}  // namespace moert
