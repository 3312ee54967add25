// The Python face of moves.h.
#include <memory>
#include <utility>

#include "py_reader.h"

namespace moert {
namespace {

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

}  // namespace

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

PyMethodDef moves_methods[] = {
    {"moves", py_moves, METH_O,
     "moves(list) -> capsule\n\nWhat is done with a record that has been read. Each move is (from, to, rows, columns, "
     "source, source_row, source_column, destination, destination_row): items of type 0 (fp32), 1 (bf16), 2 (fp16) or "
     "3 (bytes, which stay bytes), bytes from the beginning of either memory, and items from one row or column to the "
     "next."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
