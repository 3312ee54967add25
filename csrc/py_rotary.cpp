// The Python face of rotary.h.
#include "py_arguments.h"
#include "rotary.h"

namespace moert {
namespace {

constexpr long long kMostSteps = 1ll << 40;

bool check_sizes(const Rotary& of, const long long (&steps)[8]) {
    for (int64_t size : {of.batch, of.heads, of.tokens, of.width, of.turned}) {
        if (size < 1 || size > (int64_t{1} << 31)) {
            PyErr_Format(PyExc_ValueError, "%lld is no size of heads", static_cast<long long>(size));
            return false;
        }
    }
    for (long long step : steps) {
        if (step < 0 || step > kMostSteps) {
            PyErr_Format(PyExc_ValueError, "heads cannot be %lld numbers apart", step);
            return false;
        }
    }
    if (of.turned % 2 != 0 || of.turned > of.width || of.turned > kMostTurned) {
        PyErr_Format(PyExc_ValueError, "of %lld numbers %lld cannot be turned: an even number, at most %lld",
                     static_cast<long long>(of.width), static_cast<long long>(of.turned),
                     static_cast<long long>(kMostTurned));
        return false;
    }
    return true;
}

PyObject* py_rotate(PyObject*, PyObject* args) {
    const char* number_name;
    PyObject *x_object, *y_object, *cos_object, *sin_object;
    long long sizes[5], steps[8];
    if (!PyArg_ParseTuple(args, "s(LLLLL)O(LLL)O(LLL)OO(LL):rotate", &number_name, &sizes[0], &sizes[1], &sizes[2],
                          &sizes[3], &sizes[4], &x_object, &steps[0], &steps[1], &steps[2], &y_object, &steps[3],
                          &steps[4], &steps[5], &cos_object, &sin_object, &steps[6], &steps[7])) {
        return nullptr;
    }
    Rotary rotary;
    if (!as_number(number_name, &rotary.number)) return nullptr;
    rotary.batch = sizes[0];
    rotary.heads = sizes[1];
    rotary.tokens = sizes[2];
    rotary.width = sizes[3];
    rotary.turned = sizes[4];
    if (!check_sizes(rotary, steps)) return nullptr;
    const uint64_t size = static_cast<uint64_t>(bytes_of(rotary.number));
    const uint8_t *x, *y;
    if (!as_address(x_object, "x", size, false, &x) || !as_address(y_object, "y", size, false, &y) ||
        !as_address(cos_object, "cos", size, false, &rotary.cos) ||
        !as_address(sin_object, "sin", size, false, &rotary.sin)) {
        return nullptr;
    }
    const int64_t bytes = bytes_of(rotary.number);
    rotary.x = {const_cast<uint8_t*>(x), steps[0] * bytes, steps[1] * bytes, steps[2] * bytes};
    rotary.y = {const_cast<uint8_t*>(y), steps[3] * bytes, steps[4] * bytes, steps[5] * bytes};
    rotary.angle_batch_step = steps[6] * bytes;
    rotary.angle_token_step = steps[7] * bytes;
    if (is_shared_out(rotary)) {
        if (!without_gil([&] { rotate(rotary); })) return nullptr;
    } else {
        rotate(rotary);  // in less time than another thread would keep the GIL
    }
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef rotary_methods[] = {
    {"rotate", py_rotate, METH_VARARGS,
     "rotate(number, (batch, heads, tokens, width, turned), x, x_steps, y, y_steps, cos, sin, angle_steps)\n\nTurns "
     "the "
     "first numbers of each head by the angles of its token, whose cos and sin are [batch, tokens, turned], and copies "
     "the others. Steps are in numbers, of batch, head and token, and of batch and token. Blocks, without the GIL "
     "where there are many."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
