// The Python face of matrices, products and instruction sets.
#include "cpu.h"
#include "foresight.h"
#include "py_arguments.h"

namespace moert {
namespace {

PyObject* py_matrix(PyObject*, PyObject* args) {
    const char* format_name;
    int transposed;
    PyObject *group_object, *n_object, *k_object, *data_object, *scales_object, *zeros_object;
    if (!PyArg_ParseTuple(args, "spOOOOOO:matrix", &format_name, &transposed, &group_object, &n_object, &k_object,
                          &data_object, &scales_object, &zeros_object)) {
        return nullptr;
    }
    int format;
    uint64_t group, n, k;
    if (!as_choice(format_name, "format", kFormatNames, &format) ||
        !as_unsigned(group_object, "group", 1 << 20, &group) || !as_unsigned(n_object, "n", 1u << 30, &n) ||
        !as_unsigned(k_object, "k", 1u << 30, &k)) {
        return nullptr;
    }
    if (n == 0 || k == 0) {
        PyErr_Format(PyExc_ValueError, "a matrix of %llu x %llu has no numbers", static_cast<unsigned long long>(n),
                     static_cast<unsigned long long>(k));
        return nullptr;
    }
    Matrix m;
    m.format = static_cast<Format>(format);
    m.transposed = transposed != 0;
    m.group = static_cast<int>(group);
    m.n = static_cast<int64_t>(n);
    m.k = static_cast<int64_t>(k);
    const bool plain = m.format == Format::kFp32 || m.format == Format::kBf16 || m.format == Format::kFp16;
    const uint64_t size = m.format == Format::kFp32 ? 4 : plain ? 2 : 1;
    const uint64_t scale_size = m.format == Format::kFp8 ? 4 : m.format == Format::kMxfp4 ? 1 : 2;
    if (!as_address(data_object, "data", size, false, &m.data) ||
        !as_address(scales_object, "scales", plain ? 1 : scale_size, plain, &m.scales) ||
        !as_address(zeros_object, "zeros", 1, true, &m.zeros)) {
        return nullptr;
    }
    const int64_t wanted = plain ? 0 : m.format == Format::kFp8 ? kFp8Block : 32;
    const bool group_ok = m.group == wanted || (m.format == Format::kInt4 && m.group == 128);
    if (!group_ok) {
        PyErr_Format(PyExc_ValueError, "%s has no groups of %d numbers", format_name, m.group);
        return nullptr;
    }
    if (!plain && m.format != Format::kFp8 && m.k % m.group != 0) {
        PyErr_Format(PyExc_ValueError, "k = %lld is not a multiple of the group of %d numbers",
                     static_cast<long long>(m.k), m.group);
        return nullptr;
    }
    if ((m.transposed && !plain) || (m.zeros != nullptr && m.format != Format::kInt4)) {
        PyErr_Format(PyExc_ValueError, "a matrix in %s cannot be %s", format_name,
                     m.transposed ? "transposed" : "given zero points");
        return nullptr;
    }
    return enclose(std::make_unique<Matrix>(m), kMatrixName);
}

PyObject* multiply(const Product& product) {
    const bool done = without_gil([&] {
        note_reading(product.w.data, weight_bytes(product.w));
        const std::unique_ptr<Work> work = make_linear(product);
        if (product.tokens <= kTokenBlock)
            run_reading(weight_bytes(product.w), *work);
        else
            run(*work);
    });
    if (!done) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_linear(PyObject*, PyObject* args) {
    const char* number_name;
    PyObject *matrix_object, *x_object, *tokens_object, *bias_object, *y_object;
    if (!PyArg_ParseTuple(args, "OsOOOO:linear", &matrix_object, &number_name, &x_object, &tokens_object, &bias_object,
                          &y_object)) {
        return nullptr;
    }
    const Matrix* matrix = disclose<Matrix>(matrix_object, kMatrixName);
    if (matrix == nullptr) return nullptr;
    Product product;
    uint64_t tokens;
    const uint8_t* y;
    if (!as_number(number_name, &product.number) || !check_number(*matrix, product.number, "weight") ||
        !as_unsigned(tokens_object, "tokens", kMostRows, &tokens)) {
        return nullptr;
    }
    if (tokens == 0) Py_RETURN_NONE;
    const uint64_t size = static_cast<uint64_t>(bytes_of(product.number));
    if (!as_address(x_object, "x", size, false, &product.x) ||
        !as_address(bias_object, "bias", size, true, &product.bias) || !as_address(y_object, "y", size, false, &y)) {
        return nullptr;
    }
    product.w = *matrix;
    product.tokens = static_cast<int64_t>(tokens);
    product.y = const_cast<uint8_t*>(y);
    return multiply(product);
}

PyObject* py_product(PyObject*, PyObject* args) {
    const char* number_name;
    PyObject *weight_object, *n_object, *k_object, *x_object, *tokens_object, *bias_object, *y_object;
    if (!PyArg_ParseTuple(args, "sOOOOOOO:product", &number_name, &weight_object, &n_object, &k_object, &x_object,
                          &tokens_object, &bias_object, &y_object)) {
        return nullptr;
    }
    Product product;
    uint64_t n, k, tokens;
    const uint8_t* y;
    if (!as_number(number_name, &product.number) || !as_unsigned(n_object, "n", 1u << 30, &n) ||
        !as_unsigned(k_object, "k", 1u << 30, &k) || !as_unsigned(tokens_object, "tokens", kMostRows, &tokens)) {
        return nullptr;
    }
    if (n == 0 || k == 0 || tokens == 0) {
        PyErr_Format(PyExc_ValueError, "a product of %llu x %llu x %llu numbers is empty",
                     static_cast<unsigned long long>(tokens), static_cast<unsigned long long>(n),
                     static_cast<unsigned long long>(k));
        return nullptr;
    }
    const uint64_t size = static_cast<uint64_t>(bytes_of(product.number));
    if (!as_address(weight_object, "weight", size, false, &product.w.data) ||
        !as_address(x_object, "x", size, false, &product.x) ||
        !as_address(bias_object, "bias", size, true, &product.bias) || !as_address(y_object, "y", size, false, &y)) {
        return nullptr;
    }
    product.w.format = static_cast<Format>(product.number);
    product.w.n = static_cast<int64_t>(n);
    product.w.k = static_cast<int64_t>(k);
    product.tokens = static_cast<int64_t>(tokens);
    product.y = const_cast<uint8_t*>(y);
    return multiply(product);
}

PyObject* py_kernel_name(PyObject*, PyObject* args) {
    PyObject *matrix_object, *tokens_object;
    if (!PyArg_ParseTuple(args, "OO:kernel_name", &matrix_object, &tokens_object)) return nullptr;
    const Matrix* matrix = disclose<Matrix>(matrix_object, kMatrixName);
    uint64_t tokens;
    if (matrix == nullptr || !as_unsigned(tokens_object, "tokens", kMostRows, &tokens)) return nullptr;
    return PyUnicode_FromString(find_kernel(*matrix, static_cast<int64_t>(tokens)).name);
}

PyObject* py_use_isa(PyObject*, PyObject* args) {
    const char* name;
    if (!PyArg_ParseTuple(args, "z:use_isa", &name)) return nullptr;
    if (!use_isa(name)) {
        PyErr_Format(PyExc_ValueError, "instruction set '%s' is unknown or not usable on this machine, which has: %s",
                     name, isa_names(true).c_str());
        return nullptr;
    }
    return PyUnicode_FromString(isa());
}

PyObject* py_isa(PyObject*, PyObject*) {
    return PyUnicode_FromString(isa());
}

PyObject* py_use_one_stream(PyObject*, PyObject* value) {
    const bool one = value == Py_True;
    if (!one && value != Py_False && value != Py_None) {
        PyErr_SetString(PyExc_TypeError, "use_one_stream takes True, False or None");
        return nullptr;
    }
    use_one_stream(value == Py_None ? nullptr : &one);
    return PyBool_FromLong(reads_one_stream());
}

PyObject* py_isa_names(PyObject*, PyObject* args) {
    int usable_only;
    if (!PyArg_ParseTuple(args, "p:isa_names", &usable_only)) return nullptr;
    return PyUnicode_FromString(isa_names(usable_only != 0).c_str());
}

}  // namespace

PyMethodDef matrix_methods[] = {
    {"matrix", py_matrix, METH_VARARGS,
     "matrix(format, transposed, group, n, k, data, scales, zeros) -> capsule\n\nA weight [n, k] by the addresses of "
     "its "
     "parts; see matrix.h. The memory must outlive the capsule. ValueError for sizes, groups and addresses that no "
     "kernel can read."},
    {"linear", py_linear, METH_VARARGS,
     "linear(matrix, number, x, tokens, bias, y)\n\ny [tokens, n] = x [tokens, k] times the transpose of the matrix, "
     "plus "
     "bias or None, all in `number`. Blocks, without the GIL."},
    {"product", py_product, METH_VARARGS,
     "product(number, weight, n, k, x, tokens, bias, y)\n\nAs linear, for an unquantised row-major weight by its "
     "address."},
    {"kernel_name", py_kernel_name, METH_VARARGS,
     "kernel_name(matrix, tokens) -> str\n\nThe kernel that products of that many tokens use."},
    {"use_isa", py_use_isa, METH_VARARGS,
     "use_isa(name) -> str\n\nHas every product use this instruction set from now on, or with None the best there is; "
     "returns its name. Not while one runs. ValueError where this machine lacks it."},
    {"isa", py_isa, METH_NOARGS, "isa() -> str\n\nThe instruction set in use."},
    {"use_one_stream", py_use_one_stream, METH_O,
     "use_one_stream(value) -> bool\n\nHas weights be read row by row from now on, or several rows at once, or with "
     "None "
     "as this processor does best; returns which. For tests: it changes no number. Not while anything computes."},
    {"isa_names", py_isa_names, METH_VARARGS,
     "isa_names(usable_only) -> str\n\nThe instruction sets that this build has kernels for, best first."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
