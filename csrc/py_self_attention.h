// How the Python faces of attentions and of whole layers read what they are given.
#pragma once

#include "py_arguments.h"
#include "self_attention.h"

namespace moert {

constexpr uint64_t kMostNumbers = 1u << 30;

// Each sets a Python exception and returns false where the value is not one that there is.

// (matrix, bias) of [n, k] numbers of the attention's type.
bool as_projection(PyObject* object, const char* name, const SelfAttention& of, int64_t n, int64_t k,
                   Projection* projection);

// (x, cos, sin, turned, k, v, tokens, y, normed)
bool as_token(PyObject* object, const SelfAttention& of, AttendedToken* token);

}  // namespace moert
