// One token through a whole layer: attention, router and experts.
#pragma once

#include <cstdint>

#include "moe_block.h"
#include "self_attention.h"

namespace moert {

// h = x + attention(before(x)), and then h + block(after(h)).
struct TokenLayer {
    SelfAttention attention;  // with an `after` norm
    MoeBlock block;
};

struct LayerToken {
    AttendedToken attended;  // its y is h, its normed what the block is given
    BlockToken block;        // its x is not looked at, its y the layer's
};

// As run_block. The bits are those of the parts one by one. Throws PoolError as run() does, and std::bad_alloc.
void run_layer(const TokenLayer& layer, LayerToken* token);

}  // namespace moert
