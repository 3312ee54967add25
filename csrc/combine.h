// Adding an expert's outputs to the sums of its tokens.
#pragma once

#include <cstdint>

namespace moert {

// out[to[i]] += weights[i] * held[i] for rows of `width` fp32 numbers: a product, then a sum, each rounded. Each row of
// out is named at most once; `to` null: row i. Throws PoolError as run() does where the rows are many.
void add_rows(const float* held, int64_t rows, int64_t width, const int64_t* to, const float* weights, float* out);

}  // namespace moert
