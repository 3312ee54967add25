// The Python face of token_layer.h.
#include "token_layer.h"

#include "py_self_attention.h"

namespace moert {
namespace {

constexpr const char* kRouterScoreNames[kRouterScores] = {"softmax", "sigmoid", "logits"};
constexpr const char* kRouterWeightNames[kRouterWeights] = {"scores", "softmax", "sigmoid"};

bool as_rule(PyObject* object, int64_t expert_count, Router* rule) {
    const char *scores_name, *weights_name, *number_name;
    PyObject *top_k_object, *groups_object, *kept_object, *correction_object;
    int normalise, by_two, scores, weights;
    if (!PyArg_ParseTuple(object, "ssOpffOOpOs:rule", &scores_name, &weights_name, &top_k_object, &normalise,
                          &rule->epsilon, &rule->scale, &groups_object, &kept_object, &by_two, &correction_object,
                          &number_name)) {
        return false;
    }
    uint64_t top_k, groups, kept;
    const uint8_t* correction;
    rule->experts = expert_count;
    const uint64_t experts = static_cast<uint64_t>(rule->experts);
    if (!as_choice(scores_name, "scores", kRouterScoreNames, &scores) ||
        !as_choice(weights_name, "weights", kRouterWeightNames, &weights) || !as_number(number_name, &rule->number) ||
        !as_unsigned(top_k_object, "top_k", experts, &top_k) ||
        !as_unsigned(groups_object, "groups", experts, &groups) || !as_unsigned(kept_object, "groups", groups, &kept) ||
        !as_address(correction_object, "correction", 4, true, &correction)) {
        return false;
    }
    if (top_k == 0 || kept == 0 || experts % groups != 0 || top_k > experts / groups * kept) {
        PyErr_Format(PyExc_ValueError, "%llu of %llu experts cannot be picked from %llu of %llu groups",
                     static_cast<unsigned long long>(top_k), static_cast<unsigned long long>(experts),
                     static_cast<unsigned long long>(kept), static_cast<unsigned long long>(groups));
        return false;
    }
    rule->scores = static_cast<RouterScores>(scores);
    rule->weights = static_cast<RouterWeights>(weights);
    rule->top_k = static_cast<int64_t>(top_k);
    rule->groups = static_cast<int64_t>(groups);
    rule->kept_groups = static_cast<int64_t>(kept);
    rule->normalise = normalise != 0;
    rule->by_two = by_two != 0;
    rule->correction = reinterpret_cast<const float*>(correction);
    return true;
}

PyObject* py_token_layer(PyObject*, PyObject* args) {
    PyObject *attention_object, *router_object, *rule_object, *gate_object, *width_object;
    if (!PyArg_ParseTuple(args, "OO!O!O!O:token_layer", &attention_object, &PyTuple_Type, &router_object, &PyTuple_Type,
                          &rule_object, &PyTuple_Type, &gate_object, &width_object)) {
        return nullptr;
    }
    const auto* attention = disclose<SelfAttention>(attention_object, kSelfAttentionName);
    if (attention == nullptr) return nullptr;
    if (attention->after.width == 0) {
        PyErr_SetString(PyExc_ValueError, "a layer needs an attention with a norm after it");
        return nullptr;
    }
    TokenLayer layer;
    layer.attention = *attention;
    uint64_t width;
    PyObject* matrix_object = PyTuple_GetItem(router_object, 0);
    const Matrix* matrix = matrix_object == nullptr ? nullptr : disclose<Matrix>(matrix_object, kMatrixName);
    if (matrix == nullptr ||
        !as_projection(router_object, "the router", *attention, matrix->n, attention->hidden, &layer.router) ||
        !as_rule(rule_object, matrix->n, &layer.rule) || !as_gate(gate_object, &layer.gate) ||
        !as_unsigned(width_object, "width", kMostNumbers, &width)) {
        return nullptr;
    }
    layer.width = static_cast<int64_t>(width);
    return enclose(std::make_unique<TokenLayer>(layer), kTokenLayerName);
}

PyObject* py_pick(PyObject*, PyObject* args) {
    PyObject *rule_object, *logits_object, *count_object, *ids_object, *weights_object;
    if (!PyArg_ParseTuple(args, "O!OOOO:pick", &PyTuple_Type, &rule_object, &logits_object, &count_object, &ids_object,
                          &weights_object)) {
        return nullptr;
    }
    Router rule;
    uint64_t count;
    const uint8_t *logits, *ids, *weights;
    if (!as_unsigned(count_object, "experts", kMostNumbers, &count) ||
        !as_rule(rule_object, static_cast<int64_t>(count), &rule) ||
        !as_address(logits_object, "logits", 4, false, &logits) || !as_address(ids_object, "ids", 8, false, &ids) ||
        !as_address(weights_object, "weights", 4, false, &weights)) {
        return nullptr;
    }
    pick(rule, reinterpret_cast<const float*>(logits), reinterpret_cast<int64_t*>(const_cast<uint8_t*>(ids)),
         reinterpret_cast<float*>(const_cast<uint8_t*>(weights)));
    Py_RETURN_NONE;
}

PyObject* py_expert_table(PyObject*, PyObject* args) {
    PyObject *hidden_object, *width_object, *list;
    int gated;
    if (!PyArg_ParseTuple(args, "OOpO!:expert_table", &hidden_object, &width_object, &gated, &PyList_Type, &list))
        return nullptr;
    uint64_t hidden, width;
    if (!as_unsigned(hidden_object, "hidden", kMostNumbers, &hidden) ||
        !as_unsigned(width_object, "width", kMostNumbers, &width)) {
        return nullptr;
    }
    auto table = std::make_unique<ExpertTable>();
    table->hidden = static_cast<int64_t>(hidden);
    table->width = static_cast<int64_t>(width);
    table->gated = gated != 0;
    Step step;
    step.hidden = table->hidden;
    step.width = table->width;
    step.gate.gated = table->gated;
    const Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t i = 0; i < count; ++i) {
        const Expert* expert = disclose<Expert>(PyList_GetItem(list, i), kExpertName);
        if (expert == nullptr || !check_expert(*expert, step)) return nullptr;
        table->experts.push_back(*expert);
    }
    return enclose(std::move(table), kExpertTableName);
}

// (layer, token, ids, weights, logits, experts, y)
bool as_layer_token(PyObject* object, const TokenLayer** layer, LayerToken* token) {
    PyObject *layer_object, *token_object, *ids_object, *weights_object, *logits_object, *experts_object, *y_object;
    if (!PyArg_ParseTuple(object, "OO!OOOOO:layer token", &layer_object, &PyTuple_Type, &token_object, &ids_object,
                          &weights_object, &logits_object, &experts_object, &y_object)) {
        return false;
    }
    *layer = disclose<TokenLayer>(layer_object, kTokenLayerName);
    const uint8_t *ids, *weights, *logits, *y;
    if (*layer == nullptr || !as_token(token_object, (*layer)->attention, &token->attended) ||
        !as_address(ids_object, "ids", 8, false, &ids) || !as_address(weights_object, "weights", 4, false, &weights) ||
        !as_address(logits_object, "logits", static_cast<uint64_t>(bytes_of((*layer)->attention.number)), false,
                    &logits) ||
        !as_address(y_object, "y", static_cast<uint64_t>(bytes_of((*layer)->attention.number)), false, &y)) {
        return false;
    }
    if (experts_object != Py_None) {
        token->experts = disclose<ExpertTable>(experts_object, kExpertTableName);
        if (token->experts == nullptr) return false;
        const ExpertTable& table = *token->experts;
        if (table.hidden != (*layer)->attention.hidden || table.width != (*layer)->width ||
            table.gated != (*layer)->gate.gated) {
            PyErr_Format(PyExc_ValueError, "experts of %lld and %lld numbers in a layer of %lld and %lld",
                         static_cast<long long>(table.hidden), static_cast<long long>(table.width),
                         static_cast<long long>((*layer)->attention.hidden), static_cast<long long>((*layer)->width));
            return false;
        }
    }
    token->ids = reinterpret_cast<int64_t*>(const_cast<uint8_t*>(ids));
    token->weights = reinterpret_cast<float*>(const_cast<uint8_t*>(weights));
    token->logits = const_cast<uint8_t*>(logits);
    token->y = const_cast<uint8_t*>(y);
    return true;
}

PyObject* py_run_layers(PyObject*, PyObject* list) {
    if (!PyList_Check(list)) {
        PyErr_Format(PyExc_TypeError, "layers are a list, not %R", list);
        return nullptr;
    }
    const size_t count = static_cast<size_t>(PyList_Size(list));
    std::vector<const TokenLayer*> layers(count);
    std::vector<LayerToken> tokens(count);
    for (size_t i = 0; i < count; ++i) {
        PyObject* entry = PyList_GetItem(list, static_cast<Py_ssize_t>(i));
        if (!PyTuple_Check(entry)) {
            PyErr_Format(PyExc_TypeError, "a layer is a tuple, not %R", entry);
            return nullptr;
        }
        if (!as_layer_token(entry, &layers[i], &tokens[i])) return nullptr;
    }
    const bool done = without_gil([&] {
        for (size_t i = 0; i < count; ++i) {
            run_layer(*layers[i], &tokens[i]);
            if (tokens[i].experts_s < 0) break;
        }
    });
    if (!done) return nullptr;
    PyObject* seconds = PyList_New(0);
    for (size_t i = 0; seconds != nullptr && i < count; ++i) {
        PyObject* value = PyFloat_FromDouble(tokens[i].experts_s);
        if (value == nullptr || PyList_Append(seconds, value) != 0) Py_CLEAR(seconds);
        Py_XDECREF(value);
    }
    return seconds;
}

}  // namespace

PyMethodDef token_layer_methods[] = {
    {"token_layer", py_token_layer, METH_VARARGS,
     "token_layer(attention, (matrix, bias), rule, gate, width) -> capsule\n\nA layer as run_layers needs it. rule: "
     "(scores, weights, top_k, normalise, epsilon, scale, groups, kept_groups, by_two, correction, number)."},
    {"pick", py_pick, METH_VARARGS,
     "pick(rule, logits, experts, ids, weights)\n\nThe picks of one token; see router.h. All but the rule are "
     "addresses and a count."},
    {"expert_table", py_expert_table, METH_VARARGS,
     "expert_table(hidden, width, gated, experts) -> capsule\n\nAll experts of a layer, for run_layers; what they "
     "point "
     "to must outlive it."},
    {"run_layers", py_run_layers, METH_O,
     "run_layers(layers) -> seconds\n\nOne token through layers, each (layer, token, ids, weights, logits, experts, "
     "y), in "
     "their order; see token_layer.h. token is as for attend_token, experts a table or None, ids int64 and weights "
     "fp32. Returns what the experts of each took, below 0 if they were not computed; no layer after that has run. "
     "Blocks, without the GIL."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
