// The Python face of reader.h.
#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "moves.h"
#include "py.h"
#include "reader.h"

namespace moert {
namespace {

constexpr const char* kReaderName = "moert.reader";
constexpr const char* kRecordName = "moert.record";
constexpr const char* kClockName = "moert.busy_clock";
constexpr const char* kMovesName = "moert.moves";
constexpr const char* kPlanName = "moert.read_plan";

// How long a thread that waits may be deaf to signals that another one has received.
constexpr std::chrono::nanoseconds kPoll{100'000'000};

using SharedRecord = std::shared_ptr<Record>;
using SharedClock = std::shared_ptr<BusyClock>;
using SharedMoves = std::shared_ptr<const Moves>;

// A record that is read into one buffer after the other. The destinations of its parts count from the buffer's
// beginning.
struct Plan {
    std::vector<Part> parts;
    std::vector<Share> shares;
    uint64_t nbytes = 0;
    size_t buffer_bytes = 0;
    SharedMoves moves;
};

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

// Without the destination, which is still an object.
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

bool parse_move(PyObject* object, Moves* moves) {
    constexpr unsigned long long kMost = uint64_t{1} << 48;
    int from, to;
    unsigned long long rows, columns, source, source_row, source_column, destination, destination_row;
    if (!PyArg_ParseTuple(object, "iiKKKKKKK", &from, &to, &rows, &columns, &source, &source_row, &source_column,
                          &destination, &destination_row)) {
        return false;
    }
    const bool counts = rows <= kMost && columns <= kMost && source <= kMost && source_row <= kMost &&
                        source_column <= kMost && destination <= kMost && destination_row <= kMost;
    if (from < 0 || from >= kItems || to < 0 || to >= kItems || !counts ||
        !moves->add({static_cast<Item>(from), static_cast<Item>(to), rows, columns, source, source_row, source_column,
                     destination, destination_row})) {
        PyErr_Format(PyExc_ValueError, "%llu x %llu items cannot be moved from %llu to %llu", rows, columns, source,
                     destination);
        return false;
    }
    return true;
}

PyObject* py_moves(PyObject*, PyObject* list) {
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "moves are a list of tuples");
        return nullptr;
    }
    auto moves = std::make_shared<Moves>();
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        if (!parse_move(PyList_GetItem(list, i), moves.get())) return nullptr;
    }
    return enclose(std::make_unique<SharedMoves>(std::move(moves)), kMovesName);
}

bool make_after(const SharedMoves& moves, const uint8_t* source, size_t source_bytes, PyObject* destination_object,
                PyObject* destination_bytes_object, AfterRead* after) {
    uint8_t* destination;
    size_t destination_bytes;
    if (!as_range(destination_object, destination_bytes_object, &destination, &destination_bytes)) return false;
    const bool is_aligned = reinterpret_cast<uintptr_t>(destination) % kBlockBytes == 0;
    if (!is_aligned || source_bytes < moves->source_bytes || destination_bytes < moves->destination_bytes) {
        PyErr_Format(PyExc_ValueError,
                     "moves of %zu bytes into %zu need so much memory, and the latter in whole blocks",
                     moves->source_bytes, moves->destination_bytes);
        return false;
    }
    *after = [moves, source, destination] { moves->run(source, destination); };
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

// Runs `body`; a C++ exception becomes a Python one.
template <class Body>
bool with_errors(const Body& body) {
    try {
        body();
        return true;
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return false;
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

PyMethodDef reader_methods[] = {
    {"busy_clock", py_busy_clock, METH_NOARGS,
     "busy_clock() -> capsule\n\nCounts the time during which there are more calls of busy_enter than of busy_leave."},
    {"busy_enter", py_busy_enter, METH_O, "busy_enter(clock)"},
    {"busy_leave", py_busy_leave, METH_O, "busy_leave(clock)"},
    {"busy_seconds", py_busy_seconds, METH_O, "busy_seconds(clock) -> float"},
    {"reader_open", py_reader_open, METH_VARARGS,
     "reader_open(lanes, guesses, clock) -> capsule\n\nThreads that read records: for each disk as many chunks at once "
     "as there are lanes, of which `guesses` may be no demands. The clock runs while anything is read."},
    {"moves", py_moves, METH_O,
     "moves(list) -> capsule\n\nWhat is done with a record that has been read. Each move is (from, to, rows, columns, "
     "source, source_row, source_column, destination, destination_row): items of type 0 (fp32), 1 (bf16), 2 (fp16) or "
     "3 (bytes, which stay bytes), bytes from the beginning of either memory, and items from one row or column to the "
     "next."},
    {"reader_submit", py_reader_submit, METH_VARARGS,
     "reader_submit(reader, class, nbytes, parts, moving=None) -> capsule\n\nQueues a record of nbytes in class 0 "
     "(demand), 1 "
     "(promotion) or 2 (prefetch). Each part is (fd, device, inode, size, mtime_ns, offset, window_bytes, "
     "needed_bytes, destination); the caller keeps the file open and the memory there until the record is settled. "
     "`moving` is (moves, source, source_bytes, destination, destination_bytes): they are done before it is settled as "
     "whole. "
     "RuntimeError: the reader is closed, this is a fork, or there is no thread to be had."},
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
    {"reader_cancel", py_reader_ask<&Reader::cancel>, METH_VARARGS,
     "reader_cancel(reader, record) -> bool\n\nTrue, and the record is settled, if nothing of it had been begun."},
    {"reader_give_up", py_reader_ask<&Reader::give_up>, METH_VARARGS,
     "reader_give_up(reader, record) -> bool\n\nBegins no more of the record, which is settled as cancelled once what "
     "has been begun has ended; False: all of it has been."},
    {"reader_promote", py_reader_ask<&Reader::promote>, METH_VARARGS,
     "reader_promote(reader, record) -> bool\n\nMakes what has not been begun of the record a demand; False: there is "
     "nothing, or it is one."},
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
