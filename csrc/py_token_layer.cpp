// The Python face of token_layer.h.
#include "token_layer.h"

#include <cstring>
#include <vector>

#include "py_moe_block.h"
#include "py_self_attention.h"

namespace moert {
namespace {

PyObject* py_token_layer(PyObject*, PyObject* args) {
    PyObject *attention_object, *block_object;
    if (!PyArg_ParseTuple(args, "OO:token_layer", &attention_object, &block_object)) return nullptr;
    const auto* attention = disclose<SelfAttention>(attention_object, kSelfAttentionName);
    if (attention == nullptr) return nullptr;
    const auto* block = disclose<MoeBlock>(block_object, kMoeBlockName);
    if (block == nullptr) return nullptr;
    if (attention->after.width == 0) {
        PyErr_SetString(PyExc_ValueError, "a layer needs an attention with a norm after it");
        return nullptr;
    }
    if (attention->hidden != block->hidden || attention->number != block->number) {
        PyErr_Format(PyExc_ValueError, "an attention of %lld numbers in %s and a block of %lld in %s",
                     static_cast<long long>(attention->hidden), kNumberNames[static_cast<int>(attention->number)],
                     static_cast<long long>(block->hidden), kNumberNames[static_cast<int>(block->number)]);
        return nullptr;
    }
    return enclose(std::make_unique<TokenLayer>(TokenLayer{*attention, *block}), kTokenLayerName);
}

struct LayerCall {
    const TokenLayer* layer = nullptr;
    LayerToken token;
    uint8_t* copy = nullptr;  // where the output goes as well

    void run() {
        run_layer(*layer, &token);
        if (copy == nullptr || token.block.experts_s < 0) return;
        const auto hidden = static_cast<size_t>(layer->block.hidden);
        std::memcpy(copy, token.block.y, hidden * static_cast<size_t>(bytes_of(layer->block.number)));
    }
};

// (layer, token, block token, copy)
bool as_layer_call(PyObject* object, LayerCall* call) {
    PyObject *layer_object, *token_object, *block_object, *copy_object;
    if (!PyArg_ParseTuple(object, "OO!O!O:layer call", &layer_object, &PyTuple_Type, &token_object, &PyTuple_Type,
                          &block_object, &copy_object)) {
        return false;
    }
    const uint8_t* copy;
    call->layer = disclose<TokenLayer>(layer_object, kTokenLayerName);
    if (call->layer == nullptr || !as_token(token_object, call->layer->attention, &call->token.attended) ||
        !as_block_token(block_object, call->layer->block, &call->token.block) ||
        !as_address(copy_object, "copy", 1, true, &copy)) {
        return false;
    }
    call->copy = const_cast<uint8_t*>(copy);
    return true;
}

PyObject* py_run_layers(PyObject*, PyObject* list) {
    if (!PyList_Check(list)) {
        PyErr_Format(PyExc_TypeError, "layers are a list, not %R", list);
        return nullptr;
    }
    const size_t count = static_cast<size_t>(PyList_Size(list));
    std::vector<LayerCall> calls(count);
    for (size_t i = 0; i < count; ++i) {
        PyObject* entry = PyList_GetItem(list, static_cast<Py_ssize_t>(i));
        if (!PyTuple_Check(entry)) {
            PyErr_Format(PyExc_TypeError, "a layer is a tuple, not %R", entry);
            return nullptr;
        }
        if (!as_layer_call(entry, &calls[i])) return nullptr;
    }
    const bool done = without_gil([&] {
        for (LayerCall& call : calls) {
            call.run();
            if (call.token.block.experts_s < 0) break;
        }
    });
    if (!done) return nullptr;
    PyObject* seconds = PyList_New(0);
    for (size_t i = 0; seconds != nullptr && i < count; ++i) {
        PyObject* value = PyFloat_FromDouble(calls[i].token.block.experts_s);
        if (value == nullptr || PyList_Append(seconds, value) != 0) Py_CLEAR(seconds);
        Py_XDECREF(value);
    }
    return seconds;
}

}  // namespace

PyMethodDef token_layer_methods[] = {
    {"token_layer", py_token_layer, METH_VARARGS,
     "token_layer(attention, block) -> capsule\n\nA layer as run_layers needs it."},
    {"run_layers", py_run_layers, METH_O,
     "run_layers(layers) -> seconds\n\nOne token through layers, each (layer, token, block token, copy), in their "
     "order; see "
     "token_layer.h. token is as for attend_token, block token as for run_block, copy an address that a layer's output "
     "goes to as well, or None. Returns what the experts of each "
     "took, below 0 if they were not computed; no layer after that has run. Blocks, without the GIL."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
