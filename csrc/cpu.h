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

// Whether weights that are in no cache come fastest row by row with nothing asked for ahead. AMD's processors follow
// such a stream by themselves; several rows side by side, or prefetch instructions, halve what a core of theirs reads.
// Intel's read several rows that are asked for ahead at least as fast. No sum depends on it.
bool reads_one_stream();

// For tests and measurements: what `reads_one_stream` says from now on, or what it says of itself if null. Not while
// anything computes.
void use_one_stream(const bool* value);

}  // namespace moert
