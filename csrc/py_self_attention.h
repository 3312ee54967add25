// How the Python faces of attentions and of whole layers read what they are given.
#pragma once

#include "py_arguments.h"
#include "self_attention.h"

namespace moert {

// (x, cos, sin, turned, k, v, tokens, y, normed). Sets a Python exception and returns false where it is none.
bool as_token(PyObject* object, const SelfAttention& of, AttendedToken* token);

}  // namespace moert
