// Where the heads of attentions lie.
#pragma once

#include <cstdint>

namespace moert {

// A tensor [batch, heads, tokens, width]; steps in bytes, numbers of a head one after the other.
struct Heads {
    uint8_t* data;
    int64_t batch_step, head_step, token_step;
};

}  // namespace moert
