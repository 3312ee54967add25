// The Python face of self_attention.h.
#include "py_self_attention.h"

namespace moert {
namespace {

constexpr uint64_t kMostStep = uint64_t{1} << 40;

bool as_norm(PyObject* object, const char* name, const SelfAttention& of, int64_t numbers, Norm* norm) {
    if (object == Py_None) return true;
    const char* scale_name;
    double eps;
    PyObject *width_object, *weight_object;
    int scale;
    uint64_t width;
    if (!PyArg_ParseTuple(object, "sdOO:norm", &scale_name, &eps, &width_object, &weight_object) ||
        !as_choice(scale_name, "scale", kScaleNames, &scale) ||
        !as_unsigned(width_object, "width", kMostNumbers, &width) ||
        !as_address(weight_object, name, static_cast<uint64_t>(bytes_of(of.number)), false, &norm->weight)) {
        return false;
    }
    if (width == 0 || static_cast<uint64_t>(numbers) % width != 0) {
        PyErr_Format(PyExc_ValueError, "%s is of %llu numbers, which %lld are no multiple of", name,
                     static_cast<unsigned long long>(width), static_cast<long long>(numbers));
        return false;
    }
    norm->scale = static_cast<Scale>(scale);
    norm->number = of.number;
    norm->eps = static_cast<float>(eps);
    norm->width = static_cast<int64_t>(width);
    return true;
}

PyObject* py_self_attention(PyObject*, PyObject* args) {
    const char* number_name;
    PyObject *hidden_object, *heads_object, *kv_heads_object, *width_object, *q, *k, *v, *o, *q_norm, *k_norm, *before,
        *after;
    double scale;
    if (!PyArg_ParseTuple(args, "s(OOOO)d(O!O!O!O!)(OOOO):self_attention", &number_name, &hidden_object, &heads_object,
                          &kv_heads_object, &width_object, &scale, &PyTuple_Type, &q, &PyTuple_Type, &k, &PyTuple_Type,
                          &v, &PyTuple_Type, &o, &q_norm, &k_norm, &before, &after)) {
        return nullptr;
    }
    SelfAttention of;
    uint64_t hidden, heads, kv_heads, width;
    if (!as_number(number_name, &of.number) || !as_unsigned(hidden_object, "hidden", kMostNumbers, &hidden) ||
        !as_unsigned(heads_object, "heads", 1u << 20, &heads) ||
        !as_unsigned(kv_heads_object, "kv_heads", 1u << 20, &kv_heads) ||
        !as_unsigned(width_object, "width", static_cast<uint64_t>(kMostHeadWidth), &width)) {
        return nullptr;
    }
    if (hidden == 0 || kv_heads == 0 || heads == 0 || heads % kv_heads != 0 || width == 0) {
        PyErr_Format(PyExc_ValueError, "%llu query heads of %llu numbers cannot share %llu heads of keys",
                     static_cast<unsigned long long>(heads), static_cast<unsigned long long>(width),
                     static_cast<unsigned long long>(kv_heads));
        return nullptr;
    }
    of.hidden = static_cast<int64_t>(hidden);
    of.heads = static_cast<int64_t>(heads);
    of.kv_heads = static_cast<int64_t>(kv_heads);
    of.width = static_cast<int64_t>(width);
    of.scale = static_cast<float>(scale);
    const int64_t q_numbers = of.heads * of.width, kv_numbers = of.kv_heads * of.width;
    if (!as_projection(q, "q", of.number, q_numbers, of.hidden, &of.q) ||
        !as_projection(k, "k", of.number, kv_numbers, of.hidden, &of.k) ||
        !as_projection(v, "v", of.number, kv_numbers, of.hidden, &of.v) ||
        !as_projection(o, "o", of.number, of.hidden, q_numbers, &of.o) ||
        !as_norm(q_norm, "the norm of q", of, q_numbers, &of.q_norm) ||
        !as_norm(k_norm, "the norm of k", of, kv_numbers, &of.k_norm) ||
        !as_norm(before, "the norm before", of, of.hidden, &of.before) ||
        !as_norm(after, "the norm after", of, of.hidden, &of.after)) {
        return nullptr;
    }
    for (const Norm* norm : {&of.before, &of.after}) {
        if (norm->width != 0 && norm->width != of.hidden) {
            PyErr_Format(PyExc_ValueError, "a norm of %lld of %lld hidden numbers", static_cast<long long>(norm->width),
                         static_cast<long long>(of.hidden));
            return nullptr;
        }
    }
    return enclose(std::make_unique<SelfAttention>(of), kSelfAttentionName);
}

bool as_rows(PyObject* object, const char* name, const SelfAttention& of, Heads* heads) {
    PyObject *data_object, *head_object, *token_object;
    const uint8_t* data;
    uint64_t head_step, token_step;
    const uint64_t size = static_cast<uint64_t>(bytes_of(of.number));
    if (!PyArg_ParseTuple(object, "OOO:rows", &data_object, &head_object, &token_object) ||
        !as_address(data_object, name, size, false, &data) ||
        !as_unsigned(head_object, "head step", kMostStep, &head_step) ||
        !as_unsigned(token_object, "token step", kMostStep, &token_step)) {
        return false;
    }
    *heads = {const_cast<uint8_t*>(data), 0, static_cast<int64_t>(head_step * size),
              static_cast<int64_t>(token_step * size)};
    return true;
}

}  // namespace

bool as_token(PyObject* object, const SelfAttention& of, AttendedToken* token) {
    PyObject *x_object, *cos_object, *sin_object, *turned_object, *k_object, *v_object, *tokens_object, *y_object,
        *normed_object;
    if (!PyArg_ParseTuple(object, "OOOOO!O!OOO:token", &x_object, &cos_object, &sin_object, &turned_object,
                          &PyTuple_Type, &k_object, &PyTuple_Type, &v_object, &tokens_object, &y_object,
                          &normed_object)) {
        return false;
    }
    uint64_t turned, tokens;
    const uint8_t *y, *normed;
    const uint64_t size = static_cast<uint64_t>(bytes_of(of.number));
    if (!as_unsigned(turned_object, "turned", kMostTurned, &turned)) return false;
    if (turned % 2 != 0 || turned > static_cast<uint64_t>(of.width)) {
        PyErr_Format(PyExc_ValueError, "%llu numbers of heads of %lld cannot be turned",
                     static_cast<unsigned long long>(turned), static_cast<long long>(of.width));
        return false;
    }
    if (!as_address(x_object, "x", size, false, &token->x) ||
        !as_address(cos_object, "cos", size, turned == 0, &token->cos) ||
        !as_address(sin_object, "sin", size, turned == 0, &token->sin) || !as_rows(k_object, "k", of, &token->k) ||
        !as_rows(v_object, "v", of, &token->v) || !as_unsigned(tokens_object, "tokens", 1u << 31, &tokens) ||
        !as_address(y_object, "y", size, false, &y) ||
        !as_address(normed_object, "normed", size, of.after.width == 0, &normed)) {
        return false;
    }
    token->turned = static_cast<int64_t>(turned);
    token->tokens = static_cast<int64_t>(tokens);
    token->y = const_cast<uint8_t*>(y);
    token->normed = const_cast<uint8_t*>(normed);
    return true;
}

namespace {

PyObject* py_attend_token(PyObject*, PyObject* args) {
    PyObject *plan, *token_object;
    if (!PyArg_ParseTuple(args, "OO!:attend_token", &plan, &PyTuple_Type, &token_object)) return nullptr;
    const auto* of = disclose<SelfAttention>(plan, kSelfAttentionName);
    AttendedToken token;
    if (of == nullptr || !as_token(token_object, *of, &token)) return nullptr;
    if (!without_gil([&] { attend_token(*of, token); })) return nullptr;
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef self_attention_methods[] = {
    {"self_attention", py_self_attention, METH_VARARGS,
     "self_attention(number, (hidden, heads, kv_heads, width), scale, (q, k, v, o), (q_norm, k_norm, before, after)) "
     "-> capsule\n\nAn attention as attend_token needs it. Projections are (matrix, bias), norms None or (scale, eps, "
     "width, weight); biases and weights are addresses, whose memory must outlive the capsule."},
    {"attend_token", py_attend_token, METH_VARARGS,
     "attend_token(attention, (x, cos, sin, turned, k, v, tokens, y, normed))\n\nOne token through the attention; see "
     "self_attention.h. k and v are (address, head step, token step), steps in numbers, of `tokens` tokens and room "
     "for one more. Blocks, without the GIL."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
