// Root mean square norms of many rows.
#pragma once

#include <cstdint>

#include "pointwise.h"

namespace moert {

// Rows of norm.width numbers, `x_stride` and `y_stride` bytes apart; y may not overlap x. A few rows are computed on
// the calling thread; throws PoolError as run() does where they are many.
void normalise_rows(const Norm& norm, const uint8_t* x, int64_t x_stride, uint8_t* y, int64_t y_stride, int64_t rows);

// Whether they are many.
bool is_shared_out(const Norm& norm, int64_t rows);

}  // namespace moert
