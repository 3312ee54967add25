#include "py_arguments.h"

#include <cstring>

namespace moert {

bool find_name(const char* value, const char* what, const char* const* names, size_t count, int* index) {
    for (size_t i = 0; i < count; ++i) {
        if (std::strcmp(value, names[i]) == 0) {
            *index = static_cast<int>(i);
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s '%s' is unknown", what, value);
    return false;
}

bool as_number(const char* name, Number* number) {
    int index;
    if (!as_choice(name, "number type", kNumberNames, &index)) return false;
    *number = static_cast<Number>(index);
    return true;
}

bool check_number(const Matrix& w, Number number, const char* name) {
    const bool quantized = static_cast<int>(w.format) >= static_cast<int>(Format::kFp8);
    if (quantized || static_cast<int>(w.format) == static_cast<int>(number)) return true;
    PyErr_Format(PyExc_ValueError, "%s in %s with activations in %s: they must be the same", name,
                 kFormatNames[static_cast<int>(w.format)], kNumberNames[static_cast<int>(number)]);
    return false;
}

void run_here(Work& work) {
    for (int phase = 0; phase < work.phases(); ++phase)
        for (int64_t task = 0; task < work.tasks(phase); ++task) work.run(phase, task);
}

}  // namespace moert
