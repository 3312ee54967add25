// The Python face of gate_look.h.
#include <vector>

#include "gate_look.h"
#include "py_arguments.h"

namespace moert {
namespace {

// Numbers of a type in Python's memory, as floats.
class Floats {
  public:
    bool read(const char* number_name, PyObject* address, const char* what, int64_t n) {
        Number number;
        const uint8_t* at;
        if (!as_number(number_name, &number) ||
            !as_address(address, what, static_cast<uint64_t>(bytes_of(number)), false, &at)) {
            return false;
        }
        values_.resize(static_cast<size_t>(n));
        pointwise().widen(number, at, values_.data(), n);
        return true;
    }

    float* data() { return values_.data(); }

  private:
    std::vector<float> values_;
};

float* writable(const uint8_t* address) {
    return reinterpret_cast<float*>(const_cast<uint8_t*>(address));
}

// Each call takes some microseconds, so that the GIL stays with it.
PyObject* py_gate_look(PyObject*, PyObject* args) {
    const char *source_number, *weight_number;
    PyObject *source_object, *width_object, *scaled_object, *gain_object, *offset_object, *weight_object,
        *experts_object, *bias_object, *correction_object, *values_object;
    double eps;
    int count;
    if (!PyArg_ParseTuple(args, "sOOdOOOsOOOOiO:gate_look", &source_number, &source_object, &width_object, &eps,
                          &scaled_object, &gain_object, &offset_object, &weight_number, &weight_object, &experts_object,
                          &bias_object, &correction_object, &count, &values_object)) {
        return nullptr;
    }
    LookedAt router;
    Lines lines;
    uint64_t width, experts;
    const uint8_t *scaled, *gain, *offset, *bias, *correction, *values;
    if (!as_unsigned(width_object, "width", kMostNumbers, &width) ||
        !as_unsigned(experts_object, "experts", kMostNumbers, &experts) || !as_number(weight_number, &router.number) ||
        !as_address(weight_object, "weight", static_cast<uint64_t>(bytes_of(router.number)), false, &router.weight) ||
        !as_address(scaled_object, "scaled", 4, true, &scaled) || !as_address(gain_object, "gain", 4, true, &gain) ||
        !as_address(offset_object, "offset", 4, true, &offset) || !as_address(bias_object, "bias", 4, true, &bias) ||
        !as_address(correction_object, "correction", 4, true, &correction) ||
        !as_address(values_object, "values", 4, false, &values)) {
        return nullptr;
    }
    if (width == 0 || experts == 0 || count < 0 || static_cast<uint64_t>(count) > experts ||
        (gain == nullptr) != (offset == nullptr) || (eps >= 0 && scaled == nullptr)) {
        PyErr_Format(PyExc_ValueError, "the best %d of %llu experts of width %llu cannot be looked for", count,
                     static_cast<unsigned long long>(experts), static_cast<unsigned long long>(width));
        return nullptr;
    }
    router.width = static_cast<int64_t>(width);
    router.experts = static_cast<int64_t>(experts);
    router.bias = reinterpret_cast<const float*>(bias);
    router.correction = reinterpret_cast<const float*>(correction);
    lines.gain = reinterpret_cast<const float*>(gain);
    lines.offset = reinterpret_cast<const float*>(offset);
    try {
        Floats source;
        if (!source.read(source_number, source_object, "source", router.width)) return nullptr;
        const float* x = source.data();
        if (eps >= 0) {
            scale_to_one(x, static_cast<float>(eps), writable(scaled), router.width);
            x = writable(scaled);
        }
        look(router, lines, x, writable(values));
        const std::vector<int64_t> best = best_first(writable(values), router.experts, count);
        PyObject* found = PyList_New(static_cast<Py_ssize_t>(best.size()));
        for (size_t i = 0; found != nullptr && i < best.size(); ++i) {
            PyObject* id = PyLong_FromLongLong(best[i]);
            if (id == nullptr) {
                Py_CLEAR(found);
            } else {
                PyList_SetItem(found, static_cast<Py_ssize_t>(i), id);
            }
        }
        return found;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

PyObject* py_learn_lines(PyObject*, PyObject* args) {
    const char *source_number, *target_number;
    PyObject *source_object, *target_object, *width_object, *means_object, *moments_object, *gain_object,
        *offset_object;
    double share;
    int moments_too;
    if (!PyArg_ParseTuple(args, "sOsOOdpOOOO:learn_lines", &source_number, &source_object, &target_number,
                          &target_object, &width_object, &share, &moments_too, &means_object, &moments_object,
                          &gain_object, &offset_object)) {
        return nullptr;
    }
    uint64_t width;
    const uint8_t *means, *moments, *gain, *offset;
    if (!as_unsigned(width_object, "width", kMostNumbers, &width) ||
        !as_address(means_object, "means", 4, false, &means) ||
        !as_address(moments_object, "moments", 4, false, &moments) ||
        !as_address(gain_object, "gain", 4, false, &gain) || !as_address(offset_object, "offset", 4, false, &offset)) {
        return nullptr;
    }
    try {
        Floats source, target;
        const int64_t n = static_cast<int64_t>(width);
        if (!source.read(source_number, source_object, "source", n) ||
            !target.read(target_number, target_object, "target", n)) {
            return nullptr;
        }
        return PyBool_FromLong(learn_lines(source.data(), target.data(), n, static_cast<float>(share), moments_too != 0,
                                           writable(means), writable(moments), writable(gain), writable(offset)));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

}  // namespace

PyMethodDef gate_look_methods[] = {
    {"gate_look", py_gate_look, METH_VARARGS,
     "gate_look(number, source, width, eps, scaled, gain, offset, weight_number, weight, experts, bias, correction, "
     "count, values)\n\nThe `count` experts that a router would choose first for what `source` becomes, the best "
     "first; empty where something is not finite. Writes what it compared to `values`, and with eps >= 0 the source "
     "over the root of its mean square to `scaled`; see gate_look.h."},
    {"learn_lines", py_learn_lines, METH_VARARGS,
     "learn_lines(source_number, source, target_number, target, width, share, moments_too, means, moments, gain, "
     "offset)\n\nLearn that `source` became `target`; False, and nothing has changed, where they are not finite. See "
     "gate_look.h."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
