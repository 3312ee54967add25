// What the Python faces of reads, of read plans and of moves share.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "moves.h"
#include "py.h"
#include "reader.h"

namespace moert {

constexpr const char* kReaderName = "moert.reader";
constexpr const char* kRecordName = "moert.record";
constexpr const char* kMovesName = "moert.moves";

// How long a thread that waits may be deaf to signals that another one has received.
constexpr std::chrono::nanoseconds kPoll{100'000'000};

using SharedRecord = std::shared_ptr<Record>;
using SharedMoves = std::shared_ptr<const Moves>;

// Each sets a Python exception and returns false where the object is not what it must be.

// A part without its destination, which is still an object.
bool parse_source(PyObject* object, Part* part, PyObject** destination);

// What runs the moves from `source` into the destination.
bool make_after(const SharedMoves& moves, const uint8_t* source, size_t source_bytes, PyObject* destination_object,
                PyObject* destination_bytes_object, AfterRead* after);

}  // namespace moert
