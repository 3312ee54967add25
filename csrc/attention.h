// Attention of one query token a sequence.
#pragma once

#include <cstdint>

#include "pointwise.h"

namespace moert {

// `heads` is a multiple of `kv_heads`; all sizes are at least 1. The result depends on no address and not on how many
// threads there are. Throws PoolError as run() does where there is much to do, and std::bad_alloc.
void attend(const Attention& attention);

// Whether there is much.
bool is_shared_out(const Attention& attention);

}  // namespace moert
