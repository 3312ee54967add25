// One token through a router, the experts that it picks, and those that every token has.
#pragma once

#include <cstdint>
#include <vector>

#include "ffn.h"
#include "projection.h"
#include "router.h"

namespace moert {

// round(down(h)), where h = round(curve(round(gate(x))) * up_curve(round(up(x)))), or curve(round(up(x))) without a
// gate. A null up_curve changes nothing. Where
// there is a share, the result is multiplied by share_curve(round(share(x))), and rounded. Projections of no rows are
// none; all numbers have 16 bits, and a curve says what becomes of each of the 65536.
struct SharedExpert {
    Projection gate, up, down, share;
    const uint16_t* curve = nullptr;
    const uint16_t* up_curve = nullptr;
    const uint16_t* share_curve = nullptr;
};

// round(experts(x) * scale), plus what the shared expert gives, rounded again.
struct MoeBlock {
    Number number = Number::kFp32;  // of x and y
    int64_t hidden = 0;
    Projection router;  // its bias is of the weight's type
    Number logits = Number::kFp32;
    Router rule;
    Gate gate;
    int64_t width = 0;  // of the experts
    float scale = 1;
    SharedExpert shared;

    bool has_shared() const { return shared.up.w.n != 0; }
};

// Every expert of a layer, where all are in memory.
struct ExpertTable {
    int64_t hidden = 0, width = 0;
    bool gated = false;
    std::vector<Expert> experts;
};

struct BlockToken {
    const uint8_t* x = nullptr;            // [hidden]
    int64_t* ids = nullptr;                // [top_k]
    float* weights = nullptr;              // [top_k]
    uint8_t* logits = nullptr;             // of every expert, of the block's type for them
    uint8_t* shared = nullptr;             // [hidden], what the shared expert gives, if there is one
    const ExpertTable* experts = nullptr;  // null: they are not computed; ids beyond it have no weights
    uint8_t* y = nullptr;                  // [hidden]; written if they are computed
    double experts_s = -1;                 // what the experts took; below 0: they are not computed
};

// Experts are not computed either where one is picked that there is not, or that weighs 0. The bits are those of the
// parts one by one; a product of fp32 is that of a weight in fp32. Throws PoolError as run() does, and std::bad_alloc.
void run_block(const MoeBlock& block, BlockToken* token);

}  // namespace moert
