// How the Python faces of blocks and of whole layers read what they are given.
#pragma once

#include "moe_block.h"
#include "py_arguments.h"

namespace moert {

// (ids, weights, logits, shared, experts, y), all but x. Sets a Python exception and returns false where it is none.
bool as_block_token(PyObject* object, const MoeBlock& block, BlockToken* token);

}  // namespace moert
