#include "py_arguments.h"

#include <cstring>

namespace moert {

bool find_name(const char* value, const char* what, const char* const* names, size_t count, int* index) {
    for (size_t i = 0; i < count; ++i) {
        if (std::strcmp(value, names[i]) == 0) {
            *index = static_cast<int>(i);
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s '%s' is unknown", what, value);
    return false;
}

bool as_number(const char* name, Number* number) {
    int index;
    if (!as_choice(name, "number type", kNumberNames, &index)) return false;
    *number = static_cast<Number>(index);
    return true;
}

bool check_number(const Matrix& w, Number number, const char* name) {
    const bool quantized = static_cast<int>(w.format) >= static_cast<int>(Format::kFp8);
    if (quantized || static_cast<int>(w.format) == static_cast<int>(number)) return true;
    PyErr_Format(PyExc_ValueError, "%s in %s with activations in %s: they must be the same", name,
                 kFormatNames[static_cast<int>(w.format)], kNumberNames[static_cast<int>(number)]);
    return false;
}

bool as_gate(PyObject* object, Gate* gate) {
    const char* curve_name;
    int gated, interleaved, curve;
    if (!PyArg_ParseTuple(object, "sppfffff:gate", &curve_name, &gated, &interleaved, &gate->alpha, &gate->gate_limit,
                          &gate->up_limit, &gate->up_offset, &gate->output_limit) ||
        !as_choice(curve_name, "activation", kCurveNames, &curve)) {
        return false;
    }
    gate->curve = static_cast<Curve>(curve);
    gate->gated = gated != 0;
    gate->interleaved = interleaved != 0;
    return true;
}

bool check_expert(const Expert& expert, const Step& step) {
    const int64_t up_rows = step.gate.gated ? 2 * step.width : step.width;
    if (expert.up.k == step.hidden && expert.down.n == step.hidden && expert.down.k == step.width &&
        expert.up.n == up_rows) {
        return true;
    }
    PyErr_Format(PyExc_ValueError,
                 "an expert of up [%lld, %lld], down [%lld, %lld] in a layer of hidden size %lld, width %lld%s",
                 static_cast<long long>(expert.up.n), static_cast<long long>(expert.up.k),
                 static_cast<long long>(expert.down.n), static_cast<long long>(expert.down.k),
                 static_cast<long long>(step.hidden), static_cast<long long>(step.width),
                 step.gate.gated ? ", gated" : "");
    return false;
}

bool as_projection(PyObject* object, const char* name, Number number, int64_t n, int64_t k, Projection* projection) {
    PyObject *matrix_object, *bias_object;
    if (!PyArg_ParseTuple(object, "OO:projection", &matrix_object, &bias_object)) return false;
    const Matrix* matrix = disclose<Matrix>(matrix_object, kMatrixName);
    if (matrix == nullptr) return false;
    if (matrix->format != static_cast<Format>(number) || matrix->transposed || matrix->n != n || matrix->k != k) {
        PyErr_Format(PyExc_ValueError, "%s is [%lld, %lld], and not an unquantised [%lld, %lld] of the type of all",
                     name, static_cast<long long>(matrix->n), static_cast<long long>(matrix->k),
                     static_cast<long long>(n), static_cast<long long>(k));
        return false;
    }
    projection->w = *matrix;
    return as_address(bias_object, name, static_cast<uint64_t>(bytes_of(number)), true, &projection->bias);
}

}  // namespace moert
