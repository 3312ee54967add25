// Rotary position embedding of the heads of many tokens.
#pragma once

#include <cstdint>

#include "heads.h"
#include "pointwise.h"

namespace moert {

struct Rotary {
    Number number = Number::kFp32;
    int64_t batch = 0, heads = 0, tokens = 0;
    int64_t width = 0, turned = 0;  // numbers of a head, and how many of them, the first, are turned
    Heads x = {}, y = {};
    // [batch, tokens, turned], steps in bytes.
    const uint8_t *cos = nullptr, *sin = nullptr;
    int64_t angle_batch_step = 0, angle_token_step = 0;
};

// Turned numbers are even in number and at most kMostTurned. Throws PoolError as run() does where there are many.
void rotate(const Rotary& rotary);

// Whether there are many.
bool is_shared_out(const Rotary& rotary);

}  // namespace moert
