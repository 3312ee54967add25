// One token through a whole layer: attention, router and experts.
#pragma once

#include <cstdint>
#include <vector>

#include "ffn.h"
#include "router.h"
#include "self_attention.h"

namespace moert {

// h = x + attention(before(x)), and then h + experts(after(h)), picked by the router.
struct TokenLayer {
    SelfAttention attention;  // with an `after` norm
    Projection router;        // its logits are rounded to the attention's number
    Router rule;
    Gate gate;
    int64_t width = 0;  // of the experts
};

// Every expert of a layer, where all are in memory.
struct ExpertTable {
    int64_t hidden = 0, width = 0;
    bool gated = false;
    std::vector<Expert> experts;
};

struct LayerToken {
    AttendedToken attended;                // its y is h, its normed what router and experts are given
    int64_t* ids = nullptr;                // [top_k]
    float* weights = nullptr;              // [top_k]
    uint8_t* logits = nullptr;             // of every expert, of the attention\'s number
    const ExpertTable* experts = nullptr;  // null: they are not computed; ids beyond it have no weights
    uint8_t* y = nullptr;                  // [hidden]; written if they are computed
    double experts_s = -1;                 // what the experts took; below 0: they are not computed
};

// Experts are not computed either where one is picked that there is not, or that weighs 0. The bits are those of the
// parts one by one. Throws PoolError as run() does, and std::bad_alloc.
void run_layer(const TokenLayer& layer, LayerToken* token);

}  // namespace moert
