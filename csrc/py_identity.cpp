// Whether things are what they were: asked in one call, as Python itself takes long for it.
#include <cstring>

#include "py.h"

namespace moert {
namespace {

// Where CPython's dicts have the addresses of their tables. Only a hint: a wrong one costs time.
constexpr size_t kTablesAt = 32;
constexpr size_t kTables = 2;
constexpr size_t kLine = 64;
constexpr size_t kLinesAhead = 4;

// Entries are looked at after gigabytes of weights: each is several cache misses, one after the other unless they are
// asked for beforehand.
void fetch_tables(PyObject* list, Py_ssize_t count) {
    const PyObject* last = nullptr;
    for (Py_ssize_t i = 0; i < count; i += 3) {
        const PyObject* dict = PyList_GetItem(list, i);
        if (dict != last) __builtin_prefetch(reinterpret_cast<const char*>(dict) + kTablesAt);
        last = dict;
    }
    last = nullptr;
    for (Py_ssize_t i = 0; i < count; i += 3) {
        PyObject* dict = PyList_GetItem(list, i);
        if (dict == last || !PyDict_Check(dict)) continue;
        last = dict;
        const char* tables[kTables];
        std::memcpy(tables, reinterpret_cast<const char*>(dict) + kTablesAt, sizeof tables);
        for (const char* table : tables) {
            for (size_t line = 0; table != nullptr && line < kLinesAhead; ++line) {
                __builtin_prefetch(table + line * kLine);
            }
        }
    }
}

PyObject* py_holds(PyObject*, PyObject* list) {
    if (!PyList_Check(list) || PyList_Size(list) % 3 != 0) {
        PyErr_Format(PyExc_TypeError, "a list of dicts, keys and values is wanted, not %R", list);
        return nullptr;
    }
    const Py_ssize_t count = PyList_Size(list);
    fetch_tables(list, count);
    for (Py_ssize_t i = 0; i < count; i += 3) {
        PyObject *of = PyList_GetItem(list, i), *key = PyList_GetItem(list, i + 1),
                 *value = PyList_GetItem(list, i + 2);
        if (!PyDict_Check(of)) {
            PyErr_Format(PyExc_TypeError, "a dict is wanted, not %R", of);
            return nullptr;
        }
        if (key == Py_None) {
            const Py_ssize_t entries = PyLong_AsSsize_t(value);
            if (entries < 0 && PyErr_Occurred()) return nullptr;
            if (PyDict_Size(of) != entries) Py_RETURN_FALSE;
            continue;
        }
        PyObject* found = PyDict_GetItemWithError(of, key);
        if (found == nullptr && PyErr_Occurred()) return nullptr;
        if (found != (value == of ? nullptr : value)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

PyObject* py_are_at(PyObject*, PyObject* list) {
    if (!PyList_Check(list) || PyList_Size(list) % 2 != 0) {
        PyErr_Format(PyExc_TypeError, "a list of tensors and addresses is wanted, not %R", list);
        return nullptr;
    }
    const Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t i = 0; i < count; ++i) __builtin_prefetch(PyList_GetItem(list, i));
    PyObject* name = PyUnicode_InternFromString("data_ptr");
    if (name == nullptr) return nullptr;
    int same = 1;
    for (Py_ssize_t i = 0; i < count && same == 1; i += 2) {
        PyObject* address = PyObject_CallMethodObjArgs(PyList_GetItem(list, i), name, nullptr);
        same = address == nullptr ? -1 : PyObject_RichCompareBool(address, PyList_GetItem(list, i + 1), Py_EQ);
        Py_XDECREF(address);
    }
    Py_DECREF(name);
    return same < 0 ? nullptr : PyBool_FromLong(same);
}

PyObject* py_same_bytes(PyObject*, PyObject* args) {
    PyObject *a_object, *b_object, *nbytes_object;
    uint8_t *a, *b;
    size_t nbytes, same_nbytes;
    if (!PyArg_ParseTuple(args, "OOO:same_bytes", &a_object, &b_object, &nbytes_object) ||
        !as_range(a_object, nbytes_object, &a, &nbytes) || !as_range(b_object, nbytes_object, &b, &same_nbytes)) {
        return nullptr;
    }
    return PyBool_FromLong(std::memcmp(a, b, nbytes) == 0);
}

}  // namespace

PyMethodDef identity_methods[] = {
    {"holds", py_holds, METH_O,
     "holds(entries) -> bool\n\nWhether, of each dict, key and value that follow one another in a list, the dict has "
     "that "
     "very object under the key; nothing, where the value is the dict itself; or has so many entries, where the key is "
     "None."},
    {"are_at", py_are_at, METH_O,
     "are_at(tensors) -> bool\n\nWhether, of each tensor and address that follow one another in a list, the tensor's "
     "numbers begin there."},
    {"same_bytes", py_same_bytes, METH_VARARGS,
     "same_bytes(a, b, nbytes) -> bool\n\nWhether as many bytes at two addresses are the same."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
