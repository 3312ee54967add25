#include "py.h"

namespace moert {

bool as_unsigned(PyObject* object, const char* name, uint64_t limit, uint64_t* value) {
    if (!PyLong_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not %R", name, object);
        return false;
    }
    *value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred() || *value > limit) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s is %R, must be in 0..%llu", name, object,
                     static_cast<unsigned long long>(limit));
        return false;
    }
    return true;
}

bool as_count(PyObject* object, const char* name, int limit, int* value) {
    uint64_t number;
    if (!as_unsigned(object, name, static_cast<uint64_t>(limit), &number)) return false;
    if (number == 0) {
        PyErr_Format(PyExc_ValueError, "%s is 0, must be in 1..%d", name, limit);
        return false;
    }
    *value = static_cast<int>(number);
    return true;
}

bool as_range(PyObject* address_object, PyObject* nbytes_object, uint8_t** address, size_t* nbytes) {
    uint64_t start, length;
    if (!as_unsigned(address_object, "address", UINTPTR_MAX, &start)) return false;
    if (!as_unsigned(nbytes_object, "nbytes", PTRDIFF_MAX, &length)) return false;
    if (start == 0) {
        PyErr_Format(PyExc_ValueError, "address is null (nbytes %llu)", static_cast<unsigned long long>(length));
        return false;
    }
    if (length > UINTPTR_MAX - start) {
        PyErr_Format(PyExc_ValueError, "address %llu + nbytes %llu goes beyond the address space",
                     static_cast<unsigned long long>(start), static_cast<unsigned long long>(length));
        return false;
    }
    *address = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(start));
    *nbytes = static_cast<size_t>(length);
    return true;
}

bool as_address(PyObject* object, const char* name, uint64_t alignment, bool optional, const uint8_t** address) {
    if (optional && object == Py_None) {
        *address = nullptr;
        return true;
    }
    uint64_t value;
    if (!as_unsigned(object, name, UINTPTR_MAX, &value)) return false;
    if (value == 0 || value % alignment != 0) {
        PyErr_Format(PyExc_ValueError, "%s is at address %llu, must be a multiple of %llu and not null", name,
                     static_cast<unsigned long long>(value), static_cast<unsigned long long>(alignment));
        return false;
    }
    *address = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(value));
    return true;
}

}  // namespace moert
