#include "token_layer.h"

#include <vector>

#include "pointwise.h"

namespace moert {

void run_layer(const TokenLayer& layer, LayerToken* token) {
    attend_token(layer.attention, token->attended);
    BlockToken& inner = token->block;
    inner.x = token->attended.normed;
    run_block(layer.block, &inner);
    if (inner.experts_s < 0) return;
    const int64_t hidden = layer.attention.hidden;
    const Number number = layer.attention.number;
    const size_t n = static_cast<size_t>(hidden);
    std::vector<float> sums(2 * n);
    const Pointwise& each = pointwise();
    each.widen(number, token->attended.y, sums.data(), hidden);
    each.widen(number, inner.y, sums.data() + n, hidden);
    each.add(sums.data(), sums.data() + n, hidden);
    each.narrow(sums.data(), number, inner.y, hidden);
}

}  // namespace moert
