// The Python face of csrc/: argument checks, the GIL, exceptions. Everything else is plain C++ over raw pointers.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "linear.h"
#include "memory.h"

namespace {

constexpr int kMaxThreads = 1024;

// An integer in [0, limit], or ValueError.
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

PyObject* prefault(PyObject*, PyObject* args) {
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

PyObject* fill(PyObject*, PyObject* args) {
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

PyObject* stream_read(PyObject*, PyObject* args) {
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

PyObject* linear(PyObject*, PyObject* args) {
    PyObject *weight_object, *x_object, *y_object, *t_object, *n_object, *k_object;
    int is_fp16;
    if (!PyArg_ParseTuple(args, "pOOOOOO:linear", &is_fp16, &weight_object, &x_object, &y_object, &t_object, &n_object,
                          &k_object)) {
        return nullptr;
    }
    uint64_t weight, x, y, t, n, k;
    constexpr uint64_t kMaxSize = 1u << 24;
    if (!as_unsigned(weight_object, "weight", UINTPTR_MAX, &weight) || !as_unsigned(x_object, "x", UINTPTR_MAX, &x) ||
        !as_unsigned(y_object, "y", UINTPTR_MAX, &y) || !as_unsigned(t_object, "t", kMaxSize, &t) ||
        !as_unsigned(n_object, "n", kMaxSize, &n) || !as_unsigned(k_object, "k", kMaxSize, &k)) {
        return nullptr;
    }
    if (t == 0 || n == 0) Py_RETURN_NONE;
    if (weight == 0 || x == 0 || y == 0 || weight % 2 != 0 || x % 4 != 0 || y % 4 != 0) {
        PyErr_Format(PyExc_ValueError, "addresses %R, %R, %R: null, or not multiples of 2, 4 and 4", weight_object,
                     x_object, y_object);
        return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS;
    moert::linear(is_fp16 ? moert::Half::kFp16 : moert::Half::kBf16,
                  reinterpret_cast<const uint16_t*>(static_cast<uintptr_t>(weight)),
                  reinterpret_cast<const float*>(static_cast<uintptr_t>(x)),
                  reinterpret_cast<float*>(static_cast<uintptr_t>(y)), static_cast<int64_t>(t), static_cast<int64_t>(n),
                  static_cast<int64_t>(k));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject* use_isa(PyObject*, PyObject* args) {
    const char* name;
    if (!PyArg_ParseTuple(args, "z:use_isa", &name)) return nullptr;
    if (!moert::use_isa(name)) {
        PyErr_Format(PyExc_ValueError, "instruction set '%s' is unknown, or this processor lacks it", name);
        return nullptr;
    }
    return PyUnicode_FromString(moert::isa());
}

PyObject* isa(PyObject*, PyObject*) {
    return PyUnicode_FromString(moert::isa());
}

PyObject* cpu_features(PyObject*, PyObject*) {
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

PyMethodDef methods[] = {
    {"prefault", prefault, METH_VARARGS,
     "prefault(address, nbytes, threads) -> bool\n\nGives every page of the range its memory now, keeping what it "
     "holds. "
     "True if the kernel populated it, False if each page was touched. Blocks, without the GIL. OSError where the "
     "kernel "
     "refuses."},
    {"fill", fill, METH_VARARGS,
     "fill(address, nbytes, byte)\n\nSets every byte of the range. Blocks, without the GIL."},
    {"stream_read", stream_read, METH_VARARGS,
     "stream_read(address, nbytes, threads, repeats) -> float\n\nReads the range `repeats` times, split over the "
     "threads, "
     "and returns the seconds it took. Blocks, without the GIL."},
    {"linear", linear, METH_VARARGS,
     "linear(is_fp16, weight, x, y, t, n, k)\n\ny [t, n] = x [t, k] times the transpose of weight [n, k]; x and y "
     "fp32, weight bf16 or fp16, all contiguous and given by address. On the calling thread, without the GIL."},
    {"use_isa", use_isa, METH_VARARGS,
     "use_isa(name) -> str\n\nHas `linear` run with avx512, avx2 or scalar, or with None the best there is, from now "
     "on; "
     "returns what it runs with. ValueError where the processor lacks it."},
    {"isa", isa, METH_NOARGS, "isa() -> str\n\nThe instruction set that `linear` runs with."},
    {"cpu_features", cpu_features, METH_NOARGS,
     "cpu_features() -> dict[str, bool]\n\nInstruction sets that this processor runs and this operating system "
     "supports."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "moert._C",
    "C++ parts of moert. Addresses are plain integers; nothing here owns memory.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    return PyModule_Create(&definition);
}
