// The Python face of moe_block.h and router.h.
#include "py_moe_block.h"

namespace moert {
namespace {

constexpr const char* kRouterScoreNames[kRouterScores] = {"softmax", "sigmoid", "logits"};
constexpr const char* kRouterWeightNames[kRouterWeights] = {"scores", "softmax", "sigmoid"};

bool as_rule(PyObject* object, int64_t expert_count, Router* rule) {
    const char *scores_name, *weights_name, *number_name, *correction_number_name, *steps_name;
    PyObject *top_k_object, *groups_object, *kept_object, *correction_object, *lanes_object;
    int normalise, by_two, is_sorted, scores, weights;
    if (!PyArg_ParseTuple(object, "ssOpffOOpfpOsOss:rule", &scores_name, &weights_name, &top_k_object, &normalise,
                          &rule->epsilon, &rule->scale, &groups_object, &kept_object, &by_two, &rule->left_out,
                          &is_sorted, &correction_object, &correction_number_name, &lanes_object, &steps_name,
                          &number_name)) {
        return false;
    }
    uint64_t top_k, groups, kept, lanes;
    rule->experts = expert_count;
    const uint64_t experts = static_cast<uint64_t>(rule->experts);
    if (!as_choice(scores_name, "scores", kRouterScoreNames, &scores) ||
        !as_choice(weights_name, "weights", kRouterWeightNames, &weights) || !as_number(number_name, &rule->number) ||
        !as_number(correction_number_name, &rule->correction_number) || !as_number(steps_name, &rule->steps) ||
        !as_unsigned(lanes_object, "lanes", 64, &lanes) || !as_unsigned(top_k_object, "top_k", experts, &top_k) ||
        !as_unsigned(groups_object, "groups", experts, &groups) || !as_unsigned(kept_object, "groups", groups, &kept) ||
        !as_address(correction_object, "correction", static_cast<uint64_t>(bytes_of(rule->correction_number)), true,
                    &rule->correction)) {
        return false;
    }
    if (top_k == 0 || kept == 0 || experts % groups != 0 || top_k > experts / groups * kept) {
        PyErr_Format(PyExc_ValueError, "%llu of %llu experts cannot be picked from %llu of %llu groups",
                     static_cast<unsigned long long>(top_k), static_cast<unsigned long long>(experts),
                     static_cast<unsigned long long>(kept), static_cast<unsigned long long>(groups));
        return false;
    }
    rule->lanes = lanes == 0 ? 1 : static_cast<int64_t>(lanes);
    rule->scores = static_cast<RouterScores>(scores);
    rule->weights = static_cast<RouterWeights>(weights);
    rule->top_k = static_cast<int64_t>(top_k);
    rule->groups = static_cast<int64_t>(groups);
    rule->kept_groups = static_cast<int64_t>(kept);
    rule->normalise = normalise != 0;
    rule->by_two = by_two != 0;
    rule->is_sorted = is_sorted != 0;
    return true;
}

bool as_curve(PyObject* object, bool optional, const uint16_t** curve) {
    const uint8_t* data;
    if (!as_address(object, "curve", 2, optional, &data)) return false;
    *curve = reinterpret_cast<const uint16_t*>(data);
    return true;
}

// (gate, up, down, share, curve, up curve, share curve), where all but up, down and curve may be None.
bool as_shared(PyObject* object, const MoeBlock& block, SharedExpert* shared) {
    PyObject *gate, *up, *down, *share, *curve, *up_curve, *share_curve;
    if (!PyArg_ParseTuple(object, "OO!O!OOOO:shared expert", &gate, &PyTuple_Type, &up, &PyTuple_Type, &down, &share,
                          &curve, &up_curve, &share_curve)) {
        return false;
    }
    PyObject* matrix_object = PyTuple_GetItem(up, 0);
    const Matrix* matrix = matrix_object == nullptr ? nullptr : disclose<Matrix>(matrix_object, kMatrixName);
    if (matrix == nullptr || !as_projection(up, "up", block.number, matrix->n, block.hidden, &shared->up) ||
        !as_projection(down, "down", block.number, block.hidden, matrix->n, &shared->down) ||
        !as_curve(curve, false, &shared->curve) || !as_curve(up_curve, true, &shared->up_curve) ||
        !as_curve(share_curve, share == Py_None, &shared->share_curve)) {
        return false;
    }
    if (gate != Py_None && !as_projection(gate, "gate", block.number, matrix->n, block.hidden, &shared->gate))
        return false;
    return share == Py_None || as_projection(share, "share", block.number, 1, block.hidden, &shared->share);
}

// (matrix, bias, logits); logits in fp32, or else of the block's type, as the matrix then is.
bool as_router(PyObject* object, MoeBlock* block) {
    PyObject *matrix_object, *bias_object;
    const char* logits_name;
    if (!PyArg_ParseTuple(object, "OOs:router", &matrix_object, &bias_object, &logits_name)) return false;
    const Matrix* matrix = disclose<Matrix>(matrix_object, kMatrixName);
    if (matrix == nullptr || !as_number(logits_name, &block->logits)) return false;
    const Format of_block = static_cast<Format>(block->number);
    const bool is_fine = block->logits == Number::kFp32 && block->number != Number::kFp32;
    const bool is_known = is_fine ? matrix->format == Format::kFp32 || matrix->format == of_block
                                  : block->logits == block->number && matrix->format == of_block;
    if (!is_known || matrix->transposed || matrix->k != block->hidden) {
        PyErr_Format(PyExc_ValueError, "a router [%lld, %lld] in %s does not give logits in %s for %lld numbers in %s",
                     static_cast<long long>(matrix->n), static_cast<long long>(matrix->k),
                     kFormatNames[static_cast<int>(matrix->format)], logits_name, static_cast<long long>(block->hidden),
                     kNumberNames[static_cast<int>(block->number)]);
        return false;
    }
    block->router.w = *matrix;
    return as_address(bias_object, "bias", matrix->format == Format::kFp32 ? 4 : 2, true, &block->router.bias);
}

PyObject* py_moe_block(PyObject*, PyObject* args) {
    PyObject *hidden_object, *router_object, *rule_object, *gate_object, *width_object, *shared_object;
    const char* number_name;
    MoeBlock block;
    if (!PyArg_ParseTuple(args, "sOO!O!O!OfO:moe_block", &number_name, &hidden_object, &PyTuple_Type, &router_object,
                          &PyTuple_Type, &rule_object, &PyTuple_Type, &gate_object, &width_object, &block.scale,
                          &shared_object)) {
        return nullptr;
    }
    uint64_t hidden, width;
    if (!as_number(number_name, &block.number) || !as_unsigned(hidden_object, "hidden", kMostNumbers, &hidden) ||
        !as_unsigned(width_object, "width", kMostNumbers, &width)) {
        return nullptr;
    }
    block.hidden = static_cast<int64_t>(hidden);
    block.width = static_cast<int64_t>(width);
    if (!as_router(router_object, &block) || !as_rule(rule_object, block.router.w.n, &block.rule) ||
        !as_gate(gate_object, &block.gate) ||
        (shared_object != Py_None && !as_shared(shared_object, block, &block.shared))) {
        return nullptr;
    }
    return enclose(std::make_unique<MoeBlock>(block), kMoeBlockName);
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

PyObject* py_run_block(PyObject*, PyObject* args) {
    PyObject *block_object, *x_object, *token_object;
    if (!PyArg_ParseTuple(args, "OOO!:run_block", &block_object, &x_object, &PyTuple_Type, &token_object))
        return nullptr;
    const auto* block = disclose<MoeBlock>(block_object, kMoeBlockName);
    BlockToken token;
    if (block == nullptr || !as_block_token(token_object, *block, &token) ||
        !as_address(x_object, "x", static_cast<uint64_t>(bytes_of(block->number)), false, &token.x) ||
        !without_gil([&] { run_block(*block, &token); })) {
        return nullptr;
    }
    return PyFloat_FromDouble(token.experts_s);
}

}  // namespace

bool as_block_token(PyObject* object, const MoeBlock& block, BlockToken* token) {
    PyObject *ids_object, *weights_object, *logits_object, *shared_object, *experts_object, *y_object;
    if (!PyArg_ParseTuple(object, "OOOOOO:block token", &ids_object, &weights_object, &logits_object, &shared_object,
                          &experts_object, &y_object)) {
        return false;
    }
    const uint8_t *ids, *weights, *logits, *shared, *y;
    const uint64_t size = static_cast<uint64_t>(bytes_of(block.number));
    if (!as_address(ids_object, "ids", 8, false, &ids) || !as_address(weights_object, "weights", 4, false, &weights) ||
        !as_address(logits_object, "logits", static_cast<uint64_t>(bytes_of(block.logits)), false, &logits) ||
        !as_address(shared_object, "shared", size, !block.has_shared(), &shared) ||
        !as_address(y_object, "y", size, false, &y)) {
        return false;
    }
    if (experts_object != Py_None) {
        token->experts = disclose<ExpertTable>(experts_object, kExpertTableName);
        if (token->experts == nullptr) return false;
        const ExpertTable& table = *token->experts;
        if (table.hidden != block.hidden || table.width != block.width || table.gated != block.gate.gated) {
            PyErr_Format(PyExc_ValueError, "experts of %lld and %lld numbers in a layer of %lld and %lld",
                         static_cast<long long>(table.hidden), static_cast<long long>(table.width),
                         static_cast<long long>(block.hidden), static_cast<long long>(block.width));
            return false;
        }
    }
    token->ids = reinterpret_cast<int64_t*>(const_cast<uint8_t*>(ids));
    token->weights = reinterpret_cast<float*>(const_cast<uint8_t*>(weights));
    token->logits = const_cast<uint8_t*>(logits);
    token->shared = const_cast<uint8_t*>(shared);
    token->y = const_cast<uint8_t*>(y);
    return true;
}

PyMethodDef moe_block_methods[] = {
    {"moe_block", py_moe_block, METH_VARARGS,
     "moe_block(number, hidden, (matrix, bias, logits), rule, gate, width, scale, shared) -> capsule\n\nA block as "
     "run_block needs it; see moe_block.h. logits is their type. rule: (scores, weights, top_k, normalise, epsilon, "
     "scale, groups, kept_groups, by_two, left_out, is_sorted, correction, its type, lanes, steps, number). shared: "
     "None or "
     "(gate, "
     "up, down, share, curve, up_curve, share_curve), projections (matrix, bias) or None, curves addresses. What all "
     "point to "
     "must outlive the capsule."},
    {"pick", py_pick, METH_VARARGS,
     "pick(rule, logits, experts, ids, weights)\n\nThe picks of one token; see router.h. All but the rule are "
     "addresses and a count."},
    {"expert_table", py_expert_table, METH_VARARGS,
     "expert_table(hidden, width, gated, experts) -> capsule\n\nAll experts of a layer, for run_block and run_layers; "
     "what they point to must outlive it."},
    {"run_block", py_run_block, METH_VARARGS,
     "run_block(block, x, (ids, weights, logits, shared, experts, y)) -> seconds\n\nOne token through a block; ids "
     "int64 and weights fp32, experts a table or None, all else addresses. Returns what the experts took, below 0 if "
     "they were not computed. Blocks, without the GIL."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
