#pragma once

#include <vector>

namespace moert {

struct CpuFeature {
    const char* name;  // as in /proc/cpuinfo
    bool usable;
};

// What this processor can run and this operating system saves at a context switch. AMX tiles need, besides, a
// permission that each process asks the kernel for before the first tile instruction.
std::vector<CpuFeature> cpu_features();

}  // namespace moert
