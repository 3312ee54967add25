// Unquantised weights in portable C++.
#include "half.h"
#include "cpu.h"
#include "kernel.h"

namespace moert {
namespace {

struct Vec {
    using Reg = float;
    static constexpr int64_t kLanes = 1;
    static constexpr int kMostTokens = 4;

    static Reg zero() { return 0; }
    static Reg load(const float* from) { return *from; }
    static void store(float* to, Reg value) { *to = value; }
    static Reg broadcast(float value) { return value; }
    static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
    static float sum(Reg value) { return value; }
    static void prefetch(const uint8_t*) {}

    template <Format kFormat>
    static Reg weights(const uint8_t* from) {
        if (kFormat == Format::kFp32) {
            float value;
            __builtin_memcpy(&value, from, sizeof value);
            return value;
        }
        uint16_t half;
        __builtin_memcpy(&half, from, sizeof half);
        return kFormat == Format::kBf16 ? bf16_to_float(half) : fp16_to_float(half);
    }
    template <Format kFormat>
    static Reg weights_tail(const uint8_t*, int) {
        return 0;
    }
};

#include "float_rows.inl"

MOERT_FLOAT_KERNELS("scalar");

}  // namespace

const Kernel* float_scalar(const Matrix& w, int64_t) {
    return select_float(w, kKernels);
}

}  // namespace moert
