// The Python face of experts and of steps of them.
#include <vector>

#include "combine.h"
#include "foresight.h"
#include "py_arguments.h"

namespace moert {
namespace {

PyObject* py_expert(PyObject*, PyObject* args) {
    const char* number_name;
    PyObject *up_object, *down_object, *up_bias_object, *down_bias_object;
    if (!PyArg_ParseTuple(args, "sOOOO:expert", &number_name, &up_object, &down_object, &up_bias_object,
                          &down_bias_object)) {
        return nullptr;
    }
    Number number;
    const Matrix* up = disclose<Matrix>(up_object, kMatrixName);
    if (up == nullptr) return nullptr;
    const Matrix* down = disclose<Matrix>(down_object, kMatrixName);
    if (down == nullptr || !as_number(number_name, &number)) return nullptr;
    Expert expert;
    expert.up = *up;
    expert.down = *down;
    const uint64_t size = static_cast<uint64_t>(bytes_of(number));
    if (!check_number(*up, number, "up") || !check_number(*down, number, "down") ||
        !as_address(up_bias_object, "up bias", size, true, &expert.up_bias) ||
        !as_address(down_bias_object, "down bias", size, true, &expert.down_bias)) {
        return nullptr;
    }
    if (up->k != down->n || (up->n != down->k && up->n != 2 * down->k)) {
        PyErr_Format(PyExc_ValueError, "up [%lld, %lld] and down [%lld, %lld] are not of one expert",
                     static_cast<long long>(up->n), static_cast<long long>(up->k), static_cast<long long>(down->n),
                     static_cast<long long>(down->k));
        return nullptr;
    }
    return enclose(std::make_unique<Expert>(expert), kExpertName);
}

bool as_group(PyObject* object, const Step& step, uint64_t x_rows, uint64_t out_rows, Group* group) {
    PyObject *expert_object, *tokens_object, *rows_object, *weights_object, *out_row_object;
    if (!PyArg_ParseTuple(object, "OOOOO:group", &expert_object, &tokens_object, &rows_object, &weights_object,
                          &out_row_object)) {
        return false;
    }
    const Expert* expert = disclose<Expert>(expert_object, kExpertName);
    uint64_t tokens;
    const uint8_t *rows, *weights;
    if (expert == nullptr || !as_unsigned(tokens_object, "tokens", kMostRows, &tokens) ||
        !as_address(rows_object, "rows", 8, true, &rows) || !as_address(weights_object, "weights", 4, true, &weights)) {
        return false;
    }
    if (!check_expert(*expert, step)) return false;
    group->expert = *expert;
    group->tokens = static_cast<int64_t>(tokens);
    group->rows = reinterpret_cast<const int64_t*>(rows);
    group->weights = reinterpret_cast<const float*>(weights);
    if (out_row_object != Py_None) {
        uint64_t out_row;
        if (!as_unsigned(out_row_object, "out_row", kMostRows, &out_row)) return false;
        if (out_row + tokens > out_rows) {
            PyErr_Format(PyExc_ValueError, "a group's rows of out are %llu..%llu of %llu",
                         static_cast<unsigned long long>(out_row), static_cast<unsigned long long>(out_row + tokens),
                         static_cast<unsigned long long>(out_rows));
            return false;
        }
        group->out_row = static_cast<int64_t>(out_row);
    } else if (out_rows != x_rows) {
        PyErr_Format(PyExc_ValueError, "out has %llu rows and x %llu, so every group must say which of out are its own",
                     static_cast<unsigned long long>(out_rows), static_cast<unsigned long long>(x_rows));
        return false;
    }
    if (rows == nullptr && tokens > x_rows) {
        PyErr_Format(PyExc_ValueError, "a group of %llu tokens of %llu", static_cast<unsigned long long>(tokens),
                     static_cast<unsigned long long>(x_rows));
        return false;
    }
    for (int64_t i = 0; rows != nullptr && i < group->tokens; ++i) {
        if (static_cast<uint64_t>(group->rows[i]) >= x_rows) {
            PyErr_Format(PyExc_ValueError, "token %lld of a group is row %lld of %llu", static_cast<long long>(i),
                         static_cast<long long>(group->rows[i]), static_cast<unsigned long long>(x_rows));
            return false;
        }
    }
    return true;
}

bool as_step(PyObject* args, Step* step) {
    PyObject *gate_object, *hidden_object, *width_object, *x_object, *rows_object, *out_object, *out_rows_object,
        *groups;
    const char* number_name;
    if (!PyArg_ParseTuple(args, "O!sOOOOOOO!:ffn", &PyTuple_Type, &gate_object, &number_name, &hidden_object,
                          &width_object, &x_object, &rows_object, &out_object, &out_rows_object, &PyList_Type,
                          &groups)) {
        return false;
    }
    uint64_t hidden, width, x_rows, out_rows;
    const uint8_t* out;
    if (!as_gate(gate_object, &step->gate) || !as_number(number_name, &step->number) ||
        !as_unsigned(hidden_object, "hidden", 1u << 30, &hidden) ||
        !as_unsigned(width_object, "width", 1u << 30, &width) ||
        !as_unsigned(rows_object, "rows", kMostRows, &x_rows) ||
        !as_unsigned(out_rows_object, "rows of out", kMostRows, &out_rows)) {
        return false;
    }
    step->hidden = static_cast<int64_t>(hidden);
    step->width = static_cast<int64_t>(width);
    const Py_ssize_t count = PyList_Size(groups);
    for (Py_ssize_t i = 0; i < count; ++i) {
        Group group;
        if (!as_group(PyList_GetItem(groups, i), *step, x_rows, out_rows, &group)) return false;
        if (group.tokens > 0) step->groups.push_back(group);
    }
    if (step->groups.empty()) return true;
    const uint64_t size = static_cast<uint64_t>(bytes_of(step->number));
    if (!as_address(x_object, "x", size, false, &step->x) || !as_address(out_object, "out", 4, false, &out))
        return false;
    step->out = reinterpret_cast<float*>(const_cast<uint8_t*>(out));
    return true;
}

// Each layer has a gate object of its own.
void note_reading_of(PyObject* args) {
    note_reading(PyTuple_GetItem(args, 0), 0);
}

bool run_step(PyObject* args, Step&& step) {
    note_reading_of(args);
    int64_t nbytes = 0, most = 0;
    for (const Group& group : step.groups) {
        most = group.tokens > most ? group.tokens : most;
        nbytes += weight_bytes(group.expert.up) + weight_bytes(group.expert.down);
    }
    return without_gil([&] {
        const std::unique_ptr<Work> work = make_ffn(std::move(step));
        if (most <= kTokenBlock)
            run_reading(nbytes, *work);
        else
            run(*work);
    });
}

PyObject* py_ffn_run(PyObject*, PyObject* args) {
    Step step;
    if (!as_step(args, &step)) return nullptr;
    if (!step.groups.empty() && !run_step(args, std::move(step))) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_ffn_token(PyObject*, PyObject* args) {
    PyObject *gate_object, *hidden_object, *width_object, *x_object, *y_object, *weights_object, *count_object,
        *experts, *places;
    const char* number_name;
    if (!PyArg_ParseTuple(args, "O!sOOOOOOO!O!:ffn_token", &PyTuple_Type, &gate_object, &number_name, &hidden_object,
                          &width_object, &x_object, &y_object, &weights_object, &count_object, &PyList_Type, &experts,
                          &PyList_Type, &places)) {
        return nullptr;
    }
    Step step;
    uint64_t hidden, width, count;
    const uint8_t *y, *weights;
    if (!as_gate(gate_object, &step.gate) || !as_number(number_name, &step.number) ||
        !as_unsigned(hidden_object, "hidden", 1u << 30, &hidden) ||
        !as_unsigned(width_object, "width", 1u << 30, &width) ||
        !as_unsigned(count_object, "weights", kMostRows, &count)) {
        return nullptr;
    }
    const uint64_t size = static_cast<uint64_t>(bytes_of(step.number));
    if (!as_address(x_object, "x", size, false, &step.x) || !as_address(y_object, "y", size, false, &y) ||
        !as_address(weights_object, "weights", 4, false, &weights)) {
        return nullptr;
    }
    step.hidden = static_cast<int64_t>(hidden);
    step.width = static_cast<int64_t>(width);
    const Py_ssize_t n = PyList_Size(experts);
    if (n == 0 || n != PyList_Size(places)) {
        PyErr_Format(PyExc_ValueError, "%zd experts and %zd places of weights", n, PyList_Size(places));
        return nullptr;
    }
    for (Py_ssize_t i = 0; i < n; ++i) {
        const Expert* expert = disclose<Expert>(PyList_GetItem(experts, i), kExpertName);
        uint64_t place;
        if (expert == nullptr || !check_expert(*expert, step) ||
            !as_unsigned(PyList_GetItem(places, i), "place", kMostRows, &place)) {
            return nullptr;
        }
        if (place >= count) {
            PyErr_Format(PyExc_ValueError, "place %llu of %llu weights", static_cast<unsigned long long>(place),
                         static_cast<unsigned long long>(count));
            return nullptr;
        }
        Group group;
        group.expert = *expert;
        group.tokens = 1;
        group.weights = reinterpret_cast<const float*>(weights) + place;
        step.groups.push_back(group);
    }
    std::vector<float> sums(hidden);
    step.out = sums.data();
    const Number number = step.number;
    if (!run_step(args, std::move(step))) return nullptr;
    pointwise().narrow(sums.data(), number, const_cast<uint8_t*>(y), static_cast<int64_t>(hidden));
    Py_RETURN_NONE;
}

PyObject* py_ffn_submit(PyObject*, PyObject* args) {
    Step step;
    if (!as_step(args, &step)) return nullptr;
    note_reading_of(args);
    std::unique_ptr<std::shared_ptr<Job>> job;
    if (!without_gil([&] { job = std::make_unique<std::shared_ptr<Job>>(submit(make_ffn(std::move(step)))); }))
        return nullptr;
    return enclose(std::move(job), kJobName);
}

PyObject* py_add_rows(PyObject*, PyObject* args) {
    PyObject *held_object, *rows_object, *width_object, *to_object, *weights_object, *out_object, *out_rows_object;
    if (!PyArg_ParseTuple(args, "OOOOOOO:add_rows", &held_object, &rows_object, &width_object, &to_object,
                          &weights_object, &out_object, &out_rows_object)) {
        return nullptr;
    }
    uint64_t rows, width, out_rows;
    if (!as_unsigned(rows_object, "rows", kMostRows, &rows) || !as_unsigned(width_object, "width", 1u << 30, &width) ||
        !as_unsigned(out_rows_object, "rows of out", kMostRows, &out_rows)) {
        return nullptr;
    }
    if (rows == 0 || width == 0) Py_RETURN_NONE;
    const uint8_t *held, *to, *weights, *out;
    if (!as_address(held_object, "held", 4, false, &held) || !as_address(to_object, "to", 8, true, &to) ||
        !as_address(weights_object, "weights", 4, false, &weights) || !as_address(out_object, "out", 4, false, &out)) {
        return nullptr;
    }
    const int64_t* places = reinterpret_cast<const int64_t*>(to);
    for (uint64_t i = 0; i < rows; ++i) {
        const uint64_t place = places == nullptr ? i : static_cast<uint64_t>(places[i]);
        if (place >= out_rows) {
            PyErr_Format(PyExc_ValueError, "row %llu goes to row %lld of %llu", static_cast<unsigned long long>(i),
                         static_cast<long long>(place), static_cast<unsigned long long>(out_rows));
            return nullptr;
        }
    }
    const bool done = without_gil([&] {
        add_rows(reinterpret_cast<const float*>(held), static_cast<int64_t>(rows), static_cast<int64_t>(width), places,
                 reinterpret_cast<const float*>(weights), reinterpret_cast<float*>(const_cast<uint8_t*>(out)));
    });
    if (!done) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_job_ready(PyObject*, PyObject* capsule) {
    const auto* job = disclose<std::shared_ptr<Job>>(capsule, kJobName);
    return job == nullptr ? nullptr : PyBool_FromLong(ready(**job));
}

PyObject* py_job_wait(PyObject*, PyObject* capsule) {
    const auto* job = disclose<std::shared_ptr<Job>>(capsule, kJobName);
    if (job == nullptr) return nullptr;
    // A copy: the capsule may go while this waits without the GIL.
    const std::shared_ptr<Job> kept = *job;
    if (!without_gil([&] { wait(*kept); })) return nullptr;
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef ffn_methods[] = {
    {"expert", py_expert, METH_VARARGS,
     "expert(number, up, down, up_bias, down_bias) -> capsule\n\nOne expert of two matrices and biases (addresses, or "
     "None) in `number`: fp32, bf16 or fp16."},
    {"ffn_run", py_ffn_run, METH_VARARGS,
     "ffn_run(gate, number, hidden, width, x, x_rows, out, out_rows, groups)\n\nAdds to out [out_rows, hidden] (fp32) "
     "what the experts give for x [x_rows, hidden]; see ffn.h. gate: (activation, gated, interleaved, alpha, "
     "gate_limit, up_limit, up_offset, output_limit). groups: a list of (expert, tokens, rows, weights, out_row), rows "
     "and weights addresses of int64 and fp32 or None, out_row an int or None. Blocks, without the GIL."},
    {"ffn_token", py_ffn_token, METH_VARARGS,
     "ffn_token(gate, number, hidden, width, x, y, weights, count, experts, places)\n\ny [hidden] = what the experts "
     "give "
     "for x [hidden], each times the one of `count` fp32 weights that stands at its place; both of `number`. Summed in "
     "the order given, in fp32, and rounded once. Blocks, without the GIL."},
    {"ffn_submit", py_ffn_submit, METH_VARARGS,
     "ffn_submit(...) -> capsule\n\nStarts what ffn_run does and returns; all memory must stay until the job is done."},
    {"add_rows", py_add_rows, METH_VARARGS,
     "add_rows(held, rows, width, to, weights, out, out_rows)\n\nout[to[i]] += weights[i] * held[i], rows of `width` "
     "fp32 numbers by their addresses; `to` (int64, each once) or None for i. Blocks, without the GIL."},
    {"job_ready", py_job_ready, METH_O, "job_ready(job) -> bool\n\nWhether the job is done."},
    {"job_wait", py_job_wait, METH_O,
     "job_wait(job)\n\nBlocks until the job is done, taking part in it, without the GIL."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
