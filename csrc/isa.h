// The instruction sets this library has kernels for, and the one in use.
#pragma once

#include <string>

#include "kernel.h"

namespace moert {

// Has all products run with this instruction set from now on (null: the best there is). False, and no change, where
// this processor or operating system lacks it or there is no such name. Not to be called while a product runs.
bool use_isa(const char* name);

const char* isa();

// Names, best first; `usable_only` leaves out what this machine cannot run.
std::string isa_names(bool usable_only);

// The kernel for a matrix in the instruction set in use, or in the best one below it that has one. Never null.
const Kernel& find_kernel(const Matrix& w, int64_t tokens);

}  // namespace moert
