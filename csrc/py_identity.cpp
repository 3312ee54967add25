// Whether things are what they were: asked in one call, as Python itself takes long for it.
#include <cstring>

#include "py.h"

namespace moert {
namespace {

PyObject* py_holds(PyObject*, PyObject* list) {
    if (!PyList_Check(list)) {
        PyErr_Format(PyExc_TypeError, "a list is wanted, not %R", list);
        return nullptr;
    }
    const Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* entry = PyList_GetItem(list, i);
        PyObject *of, *key, *value = nullptr;
        if (!PyTuple_Check(entry)) {
            PyErr_Format(PyExc_TypeError, "a tuple is wanted, not %R", entry);
            return nullptr;
        }
        if (!PyArg_ParseTuple(entry, "O!O|O:entry", &PyDict_Type, &of, &key, &value)) return nullptr;
        PyObject* found = PyDict_GetItemWithError(of, key);
        if (found == nullptr && PyErr_Occurred()) return nullptr;
        if (found != value) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
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
     "holds(entries) -> bool\n\nWhether, of each (dict, key, value), the dict has that very object under the key; of a "
     "(dict, key), nothing."},
    {"same_bytes", py_same_bytes, METH_VARARGS,
     "same_bytes(a, b, nbytes) -> bool\n\nWhether as many bytes at two addresses are the same."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
