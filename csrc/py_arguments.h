// How the Python faces of matrices and experts read what they are given.
#pragma once

#include "ffn.h"
#include "isa.h"
#include "projection.h"
#include "py.h"

namespace moert {

constexpr uint64_t kMostRows = uint64_t{1} << 32;
constexpr uint64_t kMostNumbers = 1u << 30;

// The format's names in Python, in the order of Format.
constexpr const char* kFormatNames[kFormats] = {"fp32", "bf16", "fp16", "fp8", "int8", "int4", "mxfp4"};
constexpr const char* kNumberNames[] = {"fp32", "bf16", "fp16"};
constexpr const char* kCurveNames[kCurves] = {"identity", "silu",  "gelu",    "gelu_tanh",
                                              "relu",     "relu2", "sigmoid", "tanh"};
constexpr const char* kScaleNames[kScales] = {"after_rounding", "before_rounding", "one_plus"};

// Each sets a Python exception and returns false where the value is not one that there is.

bool find_name(const char* value, const char* what, const char* const* names, size_t count, int* index);

template <size_t kCount>
bool as_choice(const char* value, const char* what, const char* const (&names)[kCount], int* index) {
    return find_name(value, what, names, kCount, index);
}

bool as_number(const char* name, Number* number);

// Unquantised weights want activations of their own type: the kernels for 16 bits round x to it.
bool check_number(const Matrix& w, Number number, const char* name);

// (activation, gated, interleaved, alpha, gate_limit, up_limit, up_offset, output_limit)
bool as_gate(PyObject* object, Gate* gate);

bool check_expert(const Expert& expert, const Step& step);

// (matrix, bias) of [n, k] numbers of that type, the matrix as it lies.
bool as_projection(PyObject* object, const char* name, Number number, int64_t n, int64_t k, Projection* projection);

}  // namespace moert
