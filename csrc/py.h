// What the Python faces share: argument checks and the method tables that the module joins.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

namespace moert {

// Each sets a Python exception and returns false where the object is not what it must be.

// An int in [0, limit].
bool as_unsigned(PyObject* object, const char* name, uint64_t limit, uint64_t* value);

// An int in [1, limit].
bool as_count(PyObject* object, const char* name, int limit, int* value);

// An address and a length that lie within the address space; the address is not null.
bool as_range(PyObject* address_object, PyObject* nbytes_object, uint8_t** address, size_t* nbytes);

// An address that is a multiple of `alignment`; 0 (None) where `optional`.
bool as_address(PyObject* object, const char* name, uint64_t alignment, bool optional, const uint8_t** address);

// Runs `body`; a C++ exception becomes a Python one.
template <class Body>
bool with_errors(const Body& body) {
    try {
        body();
        return true;
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return false;
}

// The same without the GIL, for a `body` that does not touch Python.
template <class Body>
bool without_gil(const Body& body) {
    std::exception_ptr failure;
    Py_BEGIN_ALLOW_THREADS;
    try {
        body();
    } catch (...) {
        failure = std::current_exception();
    }
    Py_END_ALLOW_THREADS;
    return !failure || with_errors([&] { std::rethrow_exception(failure); });
}

constexpr const char* kMatrixName = "moert.matrix";
constexpr const char* kExpertName = "moert.expert";
constexpr const char* kSelfAttentionName = "moert.self_attention";
constexpr const char* kMoeBlockName = "moert.moe_block";
constexpr const char* kTokenLayerName = "moert.token_layer";
constexpr const char* kExpertTableName = "moert.expert_table";
constexpr const char* kJobName = "moert.job";

// What capsules hold is their own.

template <class T>
void destroy(PyObject* capsule) {
    delete static_cast<T*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
}

template <class T>
PyObject* enclose(std::unique_ptr<T> value, const char* name) {
    PyObject* capsule = PyCapsule_New(value.get(), name, destroy<T>);
    if (capsule != nullptr) value.release();
    return capsule;
}

// Null, and a TypeError, where the object is no capsule of that name.
template <class T>
T* disclose(PyObject* capsule, const char* name) {
    if (!PyCapsule_IsValid(capsule, name)) {
        PyErr_Format(PyExc_TypeError, "a %s is wanted, not %R", name, capsule);
        return nullptr;
    }
    return static_cast<T*>(PyCapsule_GetPointer(capsule, name));
}

// Null-terminated.
extern PyMethodDef memory_methods[];
extern PyMethodDef matrix_methods[];
extern PyMethodDef ffn_methods[];
extern PyMethodDef arriving_methods[];
extern PyMethodDef norm_methods[];
extern PyMethodDef gate_look_methods[];
extern PyMethodDef rotary_methods[];
extern PyMethodDef attention_methods[];
extern PyMethodDef self_attention_methods[];
extern PyMethodDef moe_block_methods[];
extern PyMethodDef token_layer_methods[];
extern PyMethodDef identity_methods[];
extern PyMethodDef pool_methods[];
extern PyMethodDef reader_methods[];
extern PyMethodDef read_plan_methods[];
extern PyMethodDef moves_methods[];
extern PyMethodDef mailbox_methods[];

}  // namespace moert
