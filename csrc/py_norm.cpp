// The Python face of norm.h.
#include "norm.h"

#include "py_arguments.h"

namespace moert {
namespace {

constexpr uint64_t kMostStride = uint64_t{1} << 40;

PyObject* py_rms_norm(PyObject*, PyObject* args) {
    const char *scale_name, *number_name;
    double eps;
    PyObject *weight_object, *width_object, *x_object, *x_stride_object, *y_object, *y_stride_object, *rows_object;
    if (!PyArg_ParseTuple(args, "ssdOOOOOOO:rms_norm", &scale_name, &number_name, &eps, &weight_object, &width_object,
                          &x_object, &x_stride_object, &y_object, &y_stride_object, &rows_object)) {
        return nullptr;
    }
    Norm norm;
    int scale;
    if (!as_choice(scale_name, "scale", kScaleNames, &scale) || !as_number(number_name, &norm.number)) {
        return nullptr;
    }
    norm.scale = static_cast<Scale>(scale);
    norm.eps = static_cast<float>(eps);
    const uint64_t size = static_cast<uint64_t>(bytes_of(norm.number));
    uint64_t width, rows, x_stride, y_stride;
    const uint8_t *x, *y;
    if (!as_unsigned(width_object, "width", 1u << 30, &width) || !as_unsigned(rows_object, "rows", kMostRows, &rows) ||
        !as_unsigned(x_stride_object, "x stride", kMostStride, &x_stride) ||
        !as_unsigned(y_stride_object, "y stride", kMostStride, &y_stride) ||
        !as_address(weight_object, "weight", size, false, &norm.weight) ||
        !as_address(x_object, "x", size, false, &x) || !as_address(y_object, "y", size, false, &y)) {
        return nullptr;
    }
    if (width == 0 || x_stride < width || y_stride < width) {
        PyErr_Format(PyExc_ValueError, "rows of %llu numbers cannot be %llu and %llu numbers apart",
                     static_cast<unsigned long long>(width), static_cast<unsigned long long>(x_stride),
                     static_cast<unsigned long long>(y_stride));
        return nullptr;
    }
    norm.width = static_cast<int64_t>(width);
    const auto compute = [&] {
        normalise_rows(norm, x, static_cast<int64_t>(x_stride * size), const_cast<uint8_t*>(y),
                       static_cast<int64_t>(y_stride * size), static_cast<int64_t>(rows));
    };
    if (is_shared_out(norm, static_cast<int64_t>(rows))) {
        if (!without_gil(compute)) return nullptr;
    } else {
        compute();  // in less time than another thread would keep the GIL
    }
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef norm_methods[] = {
    {"rms_norm", py_rms_norm, METH_VARARGS,
     "rms_norm(scale, number, eps, weight, width, x, x_stride, y, y_stride, rows)\n\nRows of `width` "
     "numbers divided by the root of their mean square plus eps, and multiplied with the weight where `scale` says; "
     "see pointwise.h. Strides are in numbers. Blocks, without the GIL where the rows are many."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
