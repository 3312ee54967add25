// The Python face of reader.h; py_read_plan.cpp has what submits many reads at once.
#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "py_reader.h"

namespace moert {
namespace {

constexpr const char* kClockName = "moert.busy_clock";

using SharedClock = std::shared_ptr<BusyClock>;

void destroy_reader(PyObject* capsule) {
    auto* reader = static_cast<Reader*>(PyCapsule_GetPointer(capsule, kReaderName));
    if (!reader->in_fork()) delete reader;
}

bool as_lanes(PyObject* all_object, PyObject* guesses_object, Lanes* lanes) {
    uint64_t all, guesses;
    if (!as_unsigned(all_object, "lanes", kMaxLanes, &all) || !as_unsigned(guesses_object, "guesses", all, &guesses)) {
        return false;
    }
    *lanes = {static_cast<int>(all), static_cast<int>(guesses)};
    return true;
}

PyObject* py_busy_clock(PyObject*, PyObject*) {
    return enclose(std::make_unique<SharedClock>(std::make_shared<BusyClock>()), kClockName);
}

PyObject* py_busy_enter(PyObject*, PyObject* object) {
    const auto* clock = disclose<SharedClock>(object, kClockName);
    if (clock == nullptr) return nullptr;
    (*clock)->enter();
    Py_RETURN_NONE;
}

PyObject* py_busy_leave(PyObject*, PyObject* object) {
    const auto* clock = disclose<SharedClock>(object, kClockName);
    if (clock == nullptr) return nullptr;
    (*clock)->leave();
    Py_RETURN_NONE;
}

PyObject* py_busy_seconds(PyObject*, PyObject* object) {
    const auto* clock = disclose<SharedClock>(object, kClockName);
    return clock == nullptr ? nullptr : PyFloat_FromDouble((*clock)->seconds());
}

PyObject* py_reader_open(PyObject*, PyObject* args) {
    PyObject *all_object, *guesses_object, *clock_object;
    if (!PyArg_ParseTuple(args, "OOO:reader_open", &all_object, &guesses_object, &clock_object)) return nullptr;
    const auto* clock = disclose<SharedClock>(clock_object, kClockName);
    Lanes lanes;
    if (clock == nullptr || !as_lanes(all_object, guesses_object, &lanes)) return nullptr;
    auto reader = std::make_unique<Reader>(lanes, *clock);
    PyObject* capsule = PyCapsule_New(reader.get(), kReaderName, destroy_reader);
    if (capsule != nullptr) reader.release();
    return capsule;
}

bool parse_part(PyObject* object, Part* part) {
    PyObject* address_object;
    const uint8_t* address;
    if (!parse_source(object, part, &address_object) ||
        !as_address(address_object, "destination", kBlockBytes, false, &address)) {
        return false;
    }
    if (part->window_bytes > UINTPTR_MAX - reinterpret_cast<uintptr_t>(address)) {
        PyErr_Format(PyExc_ValueError, "a window of %zu bytes ends beyond all addresses", part->window_bytes);
        return false;
    }
    part->destination = const_cast<uint8_t*>(address);
    return true;
}

bool parse_moving(PyObject* args, AfterRead* after) {
    PyObject *moves_object, *source_object, *source_bytes_object, *destination_object, *destination_bytes_object;
    if (!PyArg_ParseTuple(args, "OOOOO", &moves_object, &source_object, &source_bytes_object, &destination_object,
                          &destination_bytes_object)) {
        return false;
    }
    const auto* moves = disclose<SharedMoves>(moves_object, kMovesName);
    uint8_t* source;
    size_t source_bytes;
    return moves != nullptr && as_range(source_object, source_bytes_object, &source, &source_bytes) &&
           make_after(*moves, source, source_bytes, destination_object, destination_bytes_object, after);
}

PyObject* py_reader_submit(PyObject*, PyObject* args) {
    PyObject *reader_object, *kind_object, *nbytes_object, *parts_object, *moving_object = Py_None;
    if (!PyArg_ParseTuple(args, "OOOO!|O:reader_submit", &reader_object, &kind_object, &nbytes_object, &PyList_Type,
                          &parts_object, &moving_object)) {
        return nullptr;
    }
    AfterRead after;
    if (moving_object != Py_None && !parse_moving(moving_object, &after)) return nullptr;
    auto* reader = disclose<Reader>(reader_object, kReaderName);
    uint64_t kind, nbytes;
    if (reader == nullptr || !as_unsigned(kind_object, "class", kReadClasses - 1, &kind) ||
        !as_unsigned(nbytes_object, "nbytes", INT64_MAX, &nbytes)) {
        return nullptr;
    }
    std::vector<Part> parts(static_cast<size_t>(PyList_Size(parts_object)));
    for (size_t i = 0; i < parts.size(); i++) {
        if (!parse_part(PyList_GetItem(parts_object, static_cast<Py_ssize_t>(i)), &parts[i])) return nullptr;
    }
    auto record = std::make_unique<SharedRecord>();
    const bool done = without_gil(
        [&] { *record = reader->submit(std::move(parts), nbytes, static_cast<ReadClass>(kind), std::move(after)); });
    return done ? enclose(std::move(record), kRecordName) : nullptr;
}

bool parse_reader_and_record(PyObject* args, Reader** reader, SharedRecord** record) {
    PyObject *reader_object, *record_object;
    if (!PyArg_ParseTuple(args, "OO", &reader_object, &record_object)) return false;
    *reader = disclose<Reader>(reader_object, kReaderName);
    if (*reader == nullptr) return false;
    *record = disclose<SharedRecord>(record_object, kRecordName);
    return *record != nullptr;
}

template <bool (Reader::*kCall)(const SharedRecord&)>
PyObject* py_reader_ask(PyObject*, PyObject* args) {
    Reader* reader;
    SharedRecord* record;
    bool done = false;
    if (!parse_reader_and_record(args, &reader, &record)) return nullptr;
    if (!without_gil([&] { done = (reader->*kCall)(*record); })) return nullptr;
    return PyBool_FromLong(done);
}

PyObject* py_reader_promote(PyObject*, PyObject* args) {
    PyObject *reader_object, *record_object, *kind_object;
    if (!PyArg_ParseTuple(args, "OOO:reader_promote", &reader_object, &record_object, &kind_object)) return nullptr;
    auto* reader = disclose<Reader>(reader_object, kReaderName);
    if (reader == nullptr) return nullptr;
    auto* record = disclose<SharedRecord>(record_object, kRecordName);
    uint64_t kind;
    bool done = false;
    if (record == nullptr || !as_unsigned(kind_object, "class", kReadClasses - 1, &kind) ||
        !without_gil([&] { done = reader->promote(*record, static_cast<ReadClass>(kind)); })) {
        return nullptr;
    }
    return PyBool_FromLong(done);
}

PyObject* py_reader_set_lanes(PyObject*, PyObject* args) {
    PyObject *reader_object, *device_object, *all_object, *guesses_object;
    if (!PyArg_ParseTuple(args, "OOOO:reader_set_lanes", &reader_object, &device_object, &all_object,
                          &guesses_object)) {
        return nullptr;
    }
    auto* reader = disclose<Reader>(reader_object, kReaderName);
    uint64_t device;
    Lanes lanes;
    if (reader == nullptr || !as_unsigned(device_object, "device", UINT64_MAX, &device) ||
        !as_lanes(all_object, guesses_object, &lanes)) {
        return nullptr;
    }
    if (!without_gil([&] { reader->set_lanes(device, lanes); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_reader_saturation(PyObject*, PyObject* args) {
    PyObject* reader_object;
    double seconds, nbytes;
    if (!PyArg_ParseTuple(args, "Odd:reader_saturation", &reader_object, &seconds, &nbytes)) return nullptr;
    auto* reader = disclose<Reader>(reader_object, kReaderName);
    std::vector<Saturation> found;
    if (reader == nullptr || !without_gil([&] { found = reader->saturation(seconds, nbytes); })) return nullptr;
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(found.size()));
    for (size_t i = 0; list != nullptr && i < found.size(); i++) {
        const Saturation& one = found[i];
        PyObject* entry =
            Py_BuildValue("Kidd", static_cast<unsigned long long>(one.device), one.lanes, one.nbytes, one.seconds);
        if (entry == nullptr || PyList_SetItem(list, static_cast<Py_ssize_t>(i), entry) != 0) Py_CLEAR(list);
    }
    return list;
}

PyObject* py_reader_totals(PyObject*, PyObject* object) {
    const auto* reader = disclose<Reader>(object, kReaderName);
    if (reader == nullptr) return nullptr;
    return Py_BuildValue("KK", static_cast<unsigned long long>(reader->records()),
                         static_cast<unsigned long long>(reader->bytes_read()));
}

PyObject* py_reader_shut_down(PyObject*, PyObject* object) {
    auto* reader = disclose<Reader>(object, kReaderName);
    if (reader == nullptr || !without_gil([&] { reader->shut_down(); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_reader_close(PyObject*, PyObject* object) {
    auto* reader = disclose<Reader>(object, kReaderName);
    if (reader == nullptr || !without_gil([&] { reader->close(); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_record_state(PyObject*, PyObject* object) {
    const auto* record = disclose<SharedRecord>(object, kRecordName);
    return record == nullptr ? nullptr : PyLong_FromLong(static_cast<long>((*record)->outcome.state()));
}

PyObject* py_record_wait(PyObject*, PyObject* args) {
    PyObject *record_object, *limit_object;
    if (!PyArg_ParseTuple(args, "OO:record_wait", &record_object, &limit_object)) return nullptr;
    auto* shared = disclose<SharedRecord>(record_object, kRecordName);
    if (shared == nullptr) return nullptr;
    using Clock = std::chrono::steady_clock;
    Clock::time_point end = Clock::time_point::max();
    if (limit_object != Py_None) {
        const double limit_s = PyFloat_AsDouble(limit_object);
        if (PyErr_Occurred()) return nullptr;
        // Longer than anybody waits, and within what the clock can count.
        if (limit_s < 1e9) {
            const std::chrono::duration<double> limit(std::max(limit_s, 0.0));
            end = Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
        }
    }
    Outcome& outcome = (*shared)->outcome;
    while (outcome.state() == ReadState::kUnderWay) {
        const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - Clock::now());
        if (left.count() <= 0) break;
        bool over;
        Py_BEGIN_ALLOW_THREADS;
        over = outcome.wait(std::min(left, kPoll));
        Py_END_ALLOW_THREADS;
        if (!over && PyErr_CheckSignals() != 0) return nullptr;
    }
    return PyLong_FromLong(static_cast<long>(outcome.state()));
}

PyObject* py_record_seconds(PyObject*, PyObject* object) {
    const auto* record = disclose<SharedRecord>(object, kRecordName);
    if (record == nullptr) return nullptr;
    const bool over = (*record)->outcome.state() != ReadState::kUnderWay;
    return PyFloat_FromDouble(over ? (*record)->seconds : 0);
}

PyObject* py_record_begun(PyObject*, PyObject* object) {
    const auto* record = disclose<SharedRecord>(object, kRecordName);
    if (record == nullptr) return nullptr;
    const bool over = (*record)->outcome.state() != ReadState::kUnderWay;
    return PyLong_FromUnsignedLongLong(over ? (*record)->nbytes_begun() : 0);
}

PyObject* py_record_failure(PyObject*, PyObject* object) {
    const auto* record = disclose<SharedRecord>(object, kRecordName);
    if (record == nullptr) return nullptr;
    if ((*record)->outcome.state() != ReadState::kFailed) Py_RETURN_NONE;
    const Failure& failure = (*record)->failure;
    return Py_BuildValue("nKi", static_cast<Py_ssize_t>(failure.part), static_cast<unsigned long long>(failure.offset),
                         failure.error);
}

}  // namespace

bool parse_source(PyObject* object, Part* part, PyObject** destination) {
    unsigned long long device, inode, offset, window_bytes, needed_bytes;
    long long size, mtime_ns;
    if (!PyArg_ParseTuple(object, "iKKLLKKKO", &part->fd, &device, &inode, &size, &mtime_ns, &offset, &window_bytes,
                          &needed_bytes, destination)) {
        return false;
    }
    if (offset % kBlockBytes != 0 || window_bytes % kBlockBytes != 0 || offset > INT64_MAX - window_bytes ||
        needed_bytes > window_bytes || needed_bytes + kBlockBytes <= window_bytes) {
        PyErr_Format(PyExc_ValueError, "a window of %llu bytes at %llu, of which %llu are needed, cannot be read",
                     window_bytes, offset, needed_bytes);
        return false;
    }
    part->identity = {device, inode, size, mtime_ns};
    part->offset = offset;
    part->window_bytes = window_bytes;
    part->needed_bytes = needed_bytes;
    return true;
}

PyMethodDef reader_methods[] = {
    {"busy_clock", py_busy_clock, METH_NOARGS,
     "busy_clock() -> capsule\n\nCounts the time during which there are more calls of busy_enter than of busy_leave."},
    {"busy_enter", py_busy_enter, METH_O, "busy_enter(clock)"},
    {"busy_leave", py_busy_leave, METH_O, "busy_leave(clock)"},
    {"busy_seconds", py_busy_seconds, METH_O, "busy_seconds(clock) -> float"},
    {"reader_open", py_reader_open, METH_VARARGS,
     "reader_open(lanes, guesses, clock) -> capsule\n\nThreads that read records: for each disk as many chunks at once "
     "as there are lanes, of which `guesses` may be no demands. The clock runs while anything is read."},
    {"reader_submit", py_reader_submit, METH_VARARGS,
     "reader_submit(reader, class, nbytes, parts, moving=None) -> capsule\n\nQueues a record of nbytes in class 0 "
     "(demand), 1 "
     "(promotion) or 2 (prefetch). Each part is (fd, device, inode, size, mtime_ns, offset, window_bytes, "
     "needed_bytes, destination); the caller keeps the file open and the memory there until the record is settled. "
     "`moving` is (moves, source, source_bytes, destination, destination_bytes): they are done before it is settled as "
     "whole. "
     "RuntimeError: the reader is closed, this is a fork, or there is no thread to be had."},
    {"reader_cancel", py_reader_ask<&Reader::cancel>, METH_VARARGS,
     "reader_cancel(reader, record) -> bool\n\nTrue, and the record is settled, if nothing of it had been begun."},
    {"reader_give_up", py_reader_ask<&Reader::give_up>, METH_VARARGS,
     "reader_give_up(reader, record) -> bool\n\nBegins no more of the record, which is settled as cancelled once what "
     "has been begun has ended; False: all of it has been."},
    {"reader_promote", py_reader_promote, METH_VARARGS,
     "reader_promote(reader, record, class) -> bool\n\nRaises what has not been begun of the record to a class, and "
     "takes up again what was given up; False: there is nothing, or it is not of a lower class."},
    {"reader_set_lanes", py_reader_set_lanes, METH_VARARGS,
     "reader_set_lanes(reader, device, lanes, guesses)\n\nFor one disk, from now on. With 0 lanes nothing is begun."},
    {"reader_saturation", py_reader_saturation, METH_VARARGS,
     "reader_saturation(reader, seconds, nbytes) -> list[tuple[int, int, float, float]]\n\n(device, lanes, bytes, "
     "seconds) for each disk that has read so many bytes, in at least so long, with all lanes busy; counted anew "
     "after "
     "each report and each change of lanes."},
    {"reader_totals", py_reader_totals, METH_O, "reader_totals(reader) -> (records, bytes)\n\nOf whole records."},
    {"reader_shut_down", py_reader_shut_down, METH_O,
     "reader_shut_down(reader)\n\nSettles what has not been begun; the threads end once they have read the rest."},
    {"reader_close", py_reader_close, METH_O,
     "reader_close(reader)\n\nShuts down and waits for the threads, without the GIL."},
    {"record_state", py_record_state, METH_O,
     "record_state(record) -> int\n\n0: under way, 1: whole, 2: failed, 3: cancelled, 4: not begun when the reader was "
     "closed."},
    {"record_wait", py_record_wait, METH_VARARGS,
     "record_wait(record, seconds) -> int\n\nWaits, without the GIL and without a limit for None, until the record is "
     "settled; its state then. Raises what a signal's handler raises."},
    {"record_seconds", py_record_seconds, METH_O,
     "record_seconds(record) -> float\n\nFrom the start of its first chunk to the end of its last; 0 until it is "
     "settled."},
    {"record_begun", py_record_begun, METH_O,
     "record_begun(record) -> int\n\nBytes of the chunks that had been begun when it was settled; 0 until then."},
    {"record_failure", py_record_failure, METH_O,
     "record_failure(record) -> tuple[int, int, int] | None\n\nWhere a failed record stopped: (part, offset, errno), "
     "with 0 for a file that ended too early or was changed."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
