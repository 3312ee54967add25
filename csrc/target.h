// Opens a region of code for an instruction set. Nothing outside the region may use it before dispatch, so what a
// region calls from outside must not be an inline function that others share.
#pragma once

#define MOERT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MOERT_BEGIN_TARGET(set) MOERT_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define MOERT_END_TARGET MOERT_PRAGMA(clang attribute pop)
#else
#define MOERT_BEGIN_TARGET(set) MOERT_PRAGMA(GCC push_options) MOERT_PRAGMA(GCC target(set))
#define MOERT_END_TARGET MOERT_PRAGMA(GCC pop_options)
// GCC 12 warns of the undefined registers that its own intrinsics start from.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
