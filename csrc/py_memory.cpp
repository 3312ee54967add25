// The Python face of memory.h and cpu.h.
#include <cerrno>
#include <cstring>

#include "cpu.h"
#include "memory.h"
#include "py.h"

namespace moert {
namespace {

constexpr int kMaxThreads = 1024;

PyObject* py_prefault(PyObject*, PyObject* args) {
    PyObject *address_object, *nbytes_object, *threads_object;
    if (!PyArg_ParseTuple(args, "OOO:prefault", &address_object, &nbytes_object, &threads_object)) return nullptr;
    uint8_t* address;
    size_t nbytes;
    int threads;
    if (!as_range(address_object, nbytes_object, &address, &nbytes)) return nullptr;
    if (!as_count(threads_object, "threads", kMaxThreads, &threads)) return nullptr;
    if (nbytes == 0) Py_RETURN_TRUE;
    int failure;
    bool populated;
    Py_BEGIN_ALLOW_THREADS;
    failure = moert::prefault(address, nbytes, threads, &populated);
    Py_END_ALLOW_THREADS;
    if (failure != 0) {
        errno = failure;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyBool_FromLong(populated);
}

PyObject* py_fill(PyObject*, PyObject* args) {
    PyObject *address_object, *nbytes_object, *byte_object;
    if (!PyArg_ParseTuple(args, "OOO:fill", &address_object, &nbytes_object, &byte_object)) return nullptr;
    uint8_t* address;
    size_t nbytes;
    uint64_t byte;
    if (!as_range(address_object, nbytes_object, &address, &nbytes)) return nullptr;
    if (!as_unsigned(byte_object, "byte", 255, &byte)) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    std::memset(address, static_cast<int>(byte), nbytes);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject* py_stream_read(PyObject*, PyObject* args) {
    PyObject *address_object, *nbytes_object, *threads_object, *repeats_object;
    if (!PyArg_ParseTuple(args, "OOOO:stream_read", &address_object, &nbytes_object, &threads_object,
                          &repeats_object)) {
        return nullptr;
    }
    uint8_t* address;
    size_t nbytes;
    int threads, repeats;
    if (!as_range(address_object, nbytes_object, &address, &nbytes)) return nullptr;
    if (!as_count(threads_object, "threads", kMaxThreads, &threads)) return nullptr;
    if (!as_count(repeats_object, "repeats", 1 << 20, &repeats)) return nullptr;
    if (reinterpret_cast<uintptr_t>(address) % sizeof(uint64_t) != 0) {
        PyErr_Format(PyExc_ValueError, "address %R is not a multiple of 8", address_object);
        return nullptr;
    }
    double seconds;
    Py_BEGIN_ALLOW_THREADS;
    seconds = moert::stream_read(address, nbytes, threads, repeats);
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(seconds);
}

PyObject* py_cpu_features(PyObject*, PyObject*) {
    PyObject* features = PyDict_New();
    if (features == nullptr) return nullptr;
    for (const moert::CpuFeature& feature : moert::cpu_features()) {
        if (PyDict_SetItemString(features, feature.name, feature.usable ? Py_True : Py_False) != 0) {
            Py_DECREF(features);
            return nullptr;
        }
    }
    return features;
}

}  // namespace

PyMethodDef memory_methods[] = {
    {"prefault", py_prefault, METH_VARARGS,
     "prefault(address, nbytes, threads) -> bool\n\nGives every page of the range its memory now, keeping what it "
     "holds. "
     "True if the kernel populated it, False if each page was touched. Blocks, without the GIL. OSError where the "
     "kernel "
     "refuses."},
    {"fill", py_fill, METH_VARARGS,
     "fill(address, nbytes, byte)\n\nSets every byte of the range. Blocks, without the GIL."},
    {"stream_read", py_stream_read, METH_VARARGS,
     "stream_read(address, nbytes, threads, repeats) -> float\n\nReads the range `repeats` times, split over the "
     "threads, "
     "and returns the seconds it took. Blocks, without the GIL."},
    {"cpu_features", py_cpu_features, METH_NOARGS,
     "cpu_features() -> dict[str, bool]\n\nInstruction sets that this processor runs and this operating system "
     "supports."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
