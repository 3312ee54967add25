// A weight and what is added to its product.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace moert {

// y = x w^T + bias; bias may be null.
struct Projection {
    Matrix w;
    const uint8_t* bias = nullptr;
};

}  // namespace moert
