// The Python face of records whose reads are worked out once and submitted many at a time.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "py_reader.h"

namespace moert {
namespace {

constexpr const char* kPlanName = "moert.read_plan";

// A record that is read into one buffer after the other. The destinations of its parts count from the buffer's
// beginning.
struct Plan {
    std::vector<Part> parts;
    std::vector<Share> shares;
    uint64_t nbytes = 0;
    size_t buffer_bytes = 0;
    SharedMoves moves;
};

PyObject* py_read_plan(PyObject*, PyObject* args) {
    PyObject *nbytes_object, *parts_object, *moves_object = Py_None;
    if (!PyArg_ParseTuple(args, "OO!|O:read_plan", &nbytes_object, &PyList_Type, &parts_object, &moves_object)) {
        return nullptr;
    }
    auto plan = std::make_unique<Plan>();
    if (!as_unsigned(nbytes_object, "nbytes", INT64_MAX, &plan->nbytes)) return nullptr;
    if (moves_object != Py_None) {
        const auto* moves = disclose<SharedMoves>(moves_object, kMovesName);
        if (moves == nullptr) return nullptr;
        plan->moves = *moves;
    }
    plan->parts.resize(static_cast<size_t>(PyList_Size(parts_object)));
    for (size_t i = 0; i < plan->parts.size(); i++) {
        Part& part = plan->parts[i];
        PyObject* place_object;
        uint64_t place;
        if (!parse_source(PyList_GetItem(parts_object, static_cast<Py_ssize_t>(i)), &part, &place_object) ||
            !as_unsigned(place_object, "place", INT64_MAX - part.window_bytes, &place)) {
            return nullptr;
        }
        if (place % kBlockBytes != 0) {
            PyErr_Format(PyExc_ValueError, "place is %llu, not a multiple of %zu",
                         static_cast<unsigned long long>(place), kBlockBytes);
            return nullptr;
        }
        part.destination = reinterpret_cast<uint8_t*>(place);
        plan->buffer_bytes = std::max<size_t>(plan->buffer_bytes, place + part.window_bytes);
    }
    plan->shares = share_out(plan->parts);
    return enclose(std::move(plan), kPlanName);
}

bool parse_planned(PyObject* args, Wanted* wanted) {
    PyObject *plan_object, *buffer_object, *buffer_bytes_object, *destination_object = nullptr,
                                                                 *destination_bytes_object = nullptr;
    if (!PyArg_ParseTuple(args, "OOO|OO", &plan_object, &buffer_object, &buffer_bytes_object, &destination_object,
                          &destination_bytes_object)) {
        return false;
    }
    const auto* plan = disclose<Plan>(plan_object, kPlanName);
    uint8_t* buffer;
    size_t buffer_bytes;
    if (plan == nullptr || !as_range(buffer_object, buffer_bytes_object, &buffer, &buffer_bytes)) return false;
    if (reinterpret_cast<uintptr_t>(buffer) % kBlockBytes != 0 || buffer_bytes < plan->buffer_bytes) {
        PyErr_Format(PyExc_ValueError, "a record of %zu bytes is read into as many in whole blocks, not into %zu",
                     plan->buffer_bytes, buffer_bytes);
        return false;
    }
    if ((plan->moves != nullptr) != (destination_bytes_object != nullptr)) {
        PyErr_SetString(PyExc_ValueError, "a record has a destination if and only if it is moved");
        return false;
    }
    if (plan->moves != nullptr &&
        !make_after(plan->moves, buffer, buffer_bytes, destination_object, destination_bytes_object, &wanted->after)) {
        return false;
    }
    wanted->parts = plan->parts;
    for (Part& part : wanted->parts) part.destination = buffer + reinterpret_cast<uintptr_t>(part.destination);
    wanted->shares = plan->shares;
    wanted->nbytes = plan->nbytes;
    return true;
}

PyObject* py_reader_submit_plans(PyObject*, PyObject* args) {
    PyObject *reader_object, *kind_object, *list;
    if (!PyArg_ParseTuple(args, "OOO!:reader_submit_plans", &reader_object, &kind_object, &PyList_Type, &list)) {
        return nullptr;
    }
    auto* reader = disclose<Reader>(reader_object, kReaderName);
    uint64_t kind;
    if (reader == nullptr || !as_unsigned(kind_object, "class", kReadClasses - 1, &kind)) return nullptr;
    std::vector<Wanted> wanted(static_cast<size_t>(PyList_Size(list)));
    for (size_t i = 0; i < wanted.size(); i++) {
        if (!parse_planned(PyList_GetItem(list, static_cast<Py_ssize_t>(i)), &wanted[i])) return nullptr;
    }
    // Made before anything is queued: what is being read has somebody who knows of it.
    std::vector<SharedRecord*> records;
    PyObject* capsules = PyList_New(static_cast<Py_ssize_t>(wanted.size()));
    for (size_t i = 0; capsules != nullptr && i < wanted.size(); i++) {
        auto record = std::make_unique<SharedRecord>();
        records.push_back(record.get());
        PyObject* capsule = enclose(std::move(record), kRecordName);
        if (capsule == nullptr || PyList_SetItem(capsules, static_cast<Py_ssize_t>(i), capsule) != 0) {
            Py_CLEAR(capsules);
        }
    }
    // With the GIL: it takes less than giving it back would, and no thread of the reader ever wants it.
    const auto submit = [&] {
        std::vector<SharedRecord> queued = reader->submit(std::move(wanted), static_cast<ReadClass>(kind));
        for (size_t i = 0; i < queued.size(); i++) *records[i] = std::move(queued[i]);
    };
    if (capsules != nullptr && !with_errors(submit)) Py_CLEAR(capsules);
    return capsules;
}

}  // namespace

PyMethodDef read_plan_methods[] = {
    {"read_plan", py_read_plan, METH_VARARGS,
     "read_plan(nbytes, parts, moves=None) -> capsule\n\nA record that reader_submit_plans reads into any buffer. "
     "Parts "
     "as in reader_submit, with the place in the buffer, a multiple of 4096, for the destination."},
    {"reader_submit_plans", py_reader_submit_plans, METH_VARARGS,
     "reader_submit_plans(reader, class, plans) -> list of capsules\n\nQueues several records, all or, with an "
     "exception, "
     "none. Each is (plan, buffer, buffer_bytes), or (plan, buffer, buffer_bytes, destination, destination_bytes) "
     "where "
     "the plan has moves. Otherwise as reader_submit."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
