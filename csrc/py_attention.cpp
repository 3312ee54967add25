// The Python face of attention.h.
#include "attention.h"

#include "py_arguments.h"

namespace moert {
namespace {

constexpr long long kMostSteps = 1ll << 40;
constexpr const char* kMaskNames[kMasks] = {"none", "chosen", "added"};

bool check_sizes(const Attention& of, const long long (&steps)[11]) {
    for (int64_t size : {of.batch, of.heads, of.kv_heads, of.tokens, of.width, of.value_width}) {
        if (size < 1 || size > (int64_t{1} << 31)) {
            PyErr_Format(PyExc_ValueError, "%lld is no size of an attention", static_cast<long long>(size));
            return false;
        }
    }
    for (long long step : steps) {
        if (step < 0 || step > kMostSteps) {
            PyErr_Format(PyExc_ValueError, "heads cannot be %lld numbers apart", step);
            return false;
        }
    }
    if (of.heads % of.kv_heads != 0) {
        PyErr_Format(PyExc_ValueError, "%lld query heads cannot share %lld heads of keys",
                     static_cast<long long>(of.heads), static_cast<long long>(of.kv_heads));
        return false;
    }
    if (of.width > kMostHeadWidth || of.value_width > kMostHeadWidth) {
        PyErr_Format(PyExc_ValueError, "heads of %lld and %lld numbers: at most %lld", static_cast<long long>(of.width),
                     static_cast<long long>(of.value_width), static_cast<long long>(kMostHeadWidth));
        return false;
    }
    return true;
}

PyObject* py_attend(PyObject*, PyObject* args) {
    const char *number_name, *mask_name;
    PyObject *q_object, *k_object, *v_object, *mask_object, *y_object;
    double scale;
    long long sizes[6], steps[11];
    if (!PyArg_ParseTuple(args, "s(LLLLLL)dO(LL)O(LLL)O(LLL)sO(LLL)O:attend", &number_name, &sizes[0], &sizes[1],
                          &sizes[2], &sizes[3], &sizes[4], &sizes[5], &scale, &q_object, &steps[0], &steps[1],
                          &k_object, &steps[2], &steps[3], &steps[4], &v_object, &steps[5], &steps[6], &steps[7],
                          &mask_name, &mask_object, &steps[8], &steps[9], &steps[10], &y_object)) {
        return nullptr;
    }
    Attention of;
    int mask_kind;
    if (!as_number(number_name, &of.number) || !as_choice(mask_name, "mask", kMaskNames, &mask_kind)) return nullptr;
    of.mask_kind = static_cast<Mask>(mask_kind);
    of.batch = sizes[0];
    of.heads = sizes[1];
    of.kv_heads = sizes[2];
    of.tokens = sizes[3];
    of.width = sizes[4];
    of.value_width = sizes[5];
    of.scale = static_cast<float>(scale);
    if (!check_sizes(of, steps)) return nullptr;
    const int64_t bytes = bytes_of(of.number), mask_bytes = of.mask_kind == Mask::kChosen ? 1 : bytes;
    const uint64_t size = static_cast<uint64_t>(bytes);
    const uint8_t *q, *k, *v, *y, *mask = nullptr;
    if (!as_address(q_object, "q", size, false, &q) || !as_address(k_object, "k", size, false, &k) ||
        !as_address(v_object, "v", size, false, &v) || !as_address(y_object, "y", size, false, &y) ||
        (of.mask_kind != Mask::kNone &&
         !as_address(mask_object, "mask", static_cast<uint64_t>(mask_bytes), false, &mask))) {
        return nullptr;
    }
    of.q = {const_cast<uint8_t*>(q), steps[0] * bytes, steps[1] * bytes, 0};
    of.k = {const_cast<uint8_t*>(k), steps[2] * bytes, steps[3] * bytes, steps[4] * bytes};
    of.v = {const_cast<uint8_t*>(v), steps[5] * bytes, steps[6] * bytes, steps[7] * bytes};
    of.mask = {const_cast<uint8_t*>(mask), steps[8] * mask_bytes, steps[9] * mask_bytes, steps[10] * mask_bytes};
    of.y = const_cast<uint8_t*>(y);
    if (is_shared_out(of)) {
        if (!without_gil([&] { attend(of); })) return nullptr;
    } else {
        attend(of);  // in less time than another thread would keep the GIL
    }
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef attention_methods[] = {
    {"attend", py_attend, METH_VARARGS,
     "attend(number, (batch, heads, kv_heads, tokens, width, value_width), scale, q, q_steps, k, k_steps, v, v_steps, "
     "mask_kind, mask, mask_steps, y)\n\nSoftmax over the tokens of q . k * scale + mask, times v, for one query token "
     "a sequence; y is [batch, heads, value_width], contiguous. Steps are in numbers: of batch and head for q, of "
     "batch, head and token for the others. A mask is 'none', 'chosen' (bytes, 0 leaves a token out) or 'added'. "
     "Blocks, without the GIL where there is much to do."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
