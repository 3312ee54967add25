// One token of one sequence through a whole attention: projections, norms, rotary embedding and the attention itself.
#pragma once

#include <cstdint>

#include "attention.h"
#include "ffn.h"
#include "projection.h"

namespace moert {

// What is the same for every token. Norms of width 0 are none.
struct SelfAttention {
    Number number = Number::kFp32;  // of all that is not a product's sum
    int64_t hidden = 0, heads = 0, kv_heads = 0, width = 0;
    float scale = 1;
    Projection q, k, v, o;
    Norm q_norm, k_norm;  // of whole rows of heads, or of each head
    Norm before;          // of what comes in
    Norm after;           // of what comes in plus what the attention gives
};

struct AttendedToken {
    const uint8_t* x = nullptr;  // [hidden]
    // [turned], as many as the first numbers of each head that are turned; 0: none.
    const uint8_t *cos = nullptr, *sin = nullptr;
    int64_t turned = 0;
    // Of one sequence: `tokens` before this one, with room for it, which is written.
    Heads k = {}, v = {};
    int64_t tokens = 0;
    uint8_t* y = nullptr;       // [hidden]: what the attention gives; with an `after` norm, that plus x
    uint8_t* normed = nullptr;  // [hidden], of the `after` norm, if there is one
};

// The bits are those of the parts one by one: linear, normalise_rows, rotate and attend, each rounded to `number`.
// Sizes, strides and addresses are as those ask. Throws PoolError as run() does, and std::bad_alloc.
void attend_token(const SelfAttention& attention, const AttendedToken& token);

}  // namespace moert
