// The Python face of arriving.h.
#include "arriving.h"

#include <algorithm>
#include <vector>

#include "foresight.h"
#include "py_arguments.h"
#include "py_reader.h"

namespace moert {
namespace {

bool as_arriving(PyObject* object, const Step& step, const float* weights, uint64_t count, ArrivingExpert* arriving) {
    PyObject *expert_object, *place_object, *record_object;
    if (!PyArg_ParseTuple(object, "OOO:arriving expert", &expert_object, &place_object, &record_object)) return false;
    const auto* expert = disclose<Expert>(expert_object, kExpertName);
    uint64_t place;
    if (expert == nullptr || !check_expert(*expert, step) || !as_unsigned(place_object, "place", kMostRows, &place)) {
        return false;
    }
    if (place >= count) {
        PyErr_Format(PyExc_ValueError, "place %llu of %llu weights", static_cast<unsigned long long>(place),
                     static_cast<unsigned long long>(count));
        return false;
    }
    if (record_object != Py_None) {
        const auto* record = disclose<SharedRecord>(record_object, kRecordName);
        if (record == nullptr) return false;
        arriving->record = *record;
    }
    arriving->expert = *expert;
    arriving->weight = weights + place;
    return true;
}

PyObject* as_answer(const ArrivingStep& step) {
    PyObject* computed = PyList_New(0);
    for (const ArrivingExpert& one : step.experts()) {
        if (computed == nullptr || PyList_Append(computed, one.is_computed ? Py_True : Py_False) != 0) {
            Py_XDECREF(computed);
            return nullptr;
        }
    }
    return Py_BuildValue("Ndd", computed, step.computed_s(), step.waited_s());
}

PyObject* py_ffn_arriving(PyObject*, PyObject* args) {
    PyObject *gate_object, *hidden_object, *width_object, *x_object, *y_object, *weights_object, *count_object,
        *held_object, *list;
    const char* number_name;
    if (!PyArg_ParseTuple(args, "O!sOOOOOOOO!:ffn_arriving", &PyTuple_Type, &gate_object, &number_name, &hidden_object,
                          &width_object, &x_object, &y_object, &weights_object, &count_object, &held_object,
                          &PyList_Type, &list)) {
        return nullptr;
    }
    Step step;
    uint64_t hidden, width, count;
    const uint8_t *y, *weights, *held;
    if (!as_gate(gate_object, &step.gate) || !as_number(number_name, &step.number) ||
        !as_unsigned(hidden_object, "hidden", kMostNumbers, &hidden) ||
        !as_unsigned(width_object, "width", kMostNumbers, &width) ||
        !as_unsigned(count_object, "weights", kMostRows, &count)) {
        return nullptr;
    }
    const uint64_t size = static_cast<uint64_t>(bytes_of(step.number));
    if (!as_address(x_object, "x", size, false, &step.x) || !as_address(y_object, "y", size, false, &y) ||
        !as_address(weights_object, "weights", 4, false, &weights) ||
        !as_address(held_object, "held", 4, false, &held)) {
        return nullptr;
    }
    step.hidden = static_cast<int64_t>(hidden);
    step.width = static_cast<int64_t>(width);
    step.out = reinterpret_cast<float*>(const_cast<uint8_t*>(held));
    std::vector<ArrivingExpert> experts(static_cast<size_t>(PyList_Size(list)));
    for (size_t i = 0; i < experts.size(); ++i) {
        if (!as_arriving(PyList_GetItem(list, static_cast<Py_ssize_t>(i)), step,
                         reinterpret_cast<const float*>(weights), count, &experts[i])) {
            return nullptr;
        }
    }
    // Each layer has a gate object of its own.
    note_reading(gate_object, 0);
    std::fill_n(step.out, experts.size() * hidden, 0.0f);
    ArrivingStep arriving(step, std::move(experts));
    for (bool is_over = false; !is_over;) {
        if (!without_gil([&] { is_over = arriving.advance(kPoll); })) return nullptr;
        if (!is_over && PyErr_CheckSignals() != 0) return nullptr;
    }
    const auto is_computed = [](const ArrivingExpert& one) { return one.is_computed; };
    const auto& all = arriving.experts();
    if (std::all_of(all.begin(), all.end(), is_computed) &&
        !without_gil([&] { arriving.sum(const_cast<uint8_t*>(y)); })) {
        return nullptr;
    }
    return as_answer(arriving);
}

}  // namespace

PyMethodDef arriving_methods[] = {
    {"ffn_arriving", py_ffn_arriving, METH_VARARGS,
     "ffn_arriving(gate, number, hidden, width, x, y, weights, count, held, experts) -> (computed, seconds, waited)\n\n"
     "As ffn_token, with experts a list of (expert, place, record): one whose record is on its way is computed once it "
     "is there, None stands for one that is. held [experts, hidden] (fp32) becomes what each gives. `computed` says of "
     "which; those that are missing could not be read, and y is written only if none is. Blocks, without the GIL, and "
     "runs signal handlers."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
