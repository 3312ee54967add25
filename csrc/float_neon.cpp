// Unquantised weights with NEON. All of it is in the baseline of aarch64, so nothing here needs a target.
#include "cpu.h"
#include "kernel.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstddef>

namespace moert {
namespace {

struct Vec {
    using Reg = float32x4_t;
    static constexpr int64_t kLanes = 4;
    static constexpr int kMostTokens = 5;

    static Reg zero() { return vdupq_n_f32(0); }
    static Reg load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, Reg value) { vst1q_f32(to, value); }
    static Reg broadcast(float value) { return vdupq_n_f32(value); }
    static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
    static float sum(Reg value) { return vaddvq_f32(value); }
    static void prefetch(const uint8_t* at) { __builtin_prefetch(at); }

    template <Format kFormat>
    static Reg weights(const uint8_t* from) {
        if (kFormat == Format::kFp32) return vld1q_f32(reinterpret_cast<const float*>(from));
        return widen<kFormat>(vld1_u16(reinterpret_cast<const uint16_t*>(from)));
    }
    // Lane by lane: a copy of n bytes is a call, around which no sum stays in a register.
    template <Format kFormat>
    static Reg weights_tail(const uint8_t* from, int n) {
        if (kFormat == Format::kFp32) {
            const float* numbers = reinterpret_cast<const float*>(from);
            float32x4_t value = vsetq_lane_f32(numbers[0], zero(), 0);
            if (n > 1) value = vsetq_lane_f32(numbers[1], value, 1);
            if (n > 2) value = vsetq_lane_f32(numbers[2], value, 2);
            return value;
        }
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
        uint16x4_t bits = vset_lane_u16(halves[0], vdup_n_u16(0), 0);
        if (n > 1) bits = vset_lane_u16(halves[1], bits, 1);
        if (n > 2) bits = vset_lane_u16(halves[2], bits, 2);
        return widen<kFormat>(bits);
    }

  private:
    template <Format kFormat>
    static Reg widen(uint16x4_t bits) {
        if (kFormat == Format::kFp16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
        return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
    }
};

#include "float_rows.inl"

MOERT_FLOAT_KERNELS("neon");

}  // namespace

const Kernel* float_neon(const Matrix& w, int64_t) {
    return select_float(w, kKernels);
}

}  // namespace moert

#endif
