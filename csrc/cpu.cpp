#include "cpu.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define MOERT_X86 1
#endif

namespace moert {
namespace {

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

bool bit(unsigned word, int index) {
    return (word >> index) & 1u;
}

#ifdef MOERT_X86

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    // __get_cpuid_count checks the highest leaf and leaves zeros where there is none.
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

uint64_t saved_state_mask() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

#endif

bool is_amd() {
#ifdef MOERT_X86
    const Registers r = cpuid(0, 0);
    const unsigned letters[3] = {r.ebx, r.edx, r.ecx};
    char maker[12];
    std::memcpy(maker, letters, sizeof maker);
    return std::memcmp(maker, "AuthenticAMD", 12) == 0 || std::memcmp(maker, "HygonGenuine", 12) == 0;
#else
    return false;
#endif
}

bool& one_stream() {
    static bool value = is_amd();
    return value;
}

}  // namespace

std::vector<CpuFeature> cpu_features() {
    bool neon = false;
#if defined(__aarch64__) || defined(__ARM_NEON)
    neon = true;
#endif
    Registers basic, extended, extended1;
    bool ymm = false, zmm = false, tiles = false;
#ifdef MOERT_X86
    basic = cpuid(1, 0);
    extended = cpuid(7, 0);
    if (extended.eax >= 1) extended1 = cpuid(7, 1);
    const int osxsave = 27;
    if (bit(basic.ecx, osxsave)) {
        const uint64_t saved = saved_state_mask();
        const uint64_t ymm_state = 0x6, zmm_state = 0xe6, tile_state = 0x60000;
        ymm = (saved & ymm_state) == ymm_state;
        zmm = (saved & zmm_state) == zmm_state;
        tiles = (saved & tile_state) == tile_state;
    }
#endif
    return {
        {"avx2", ymm && bit(extended.ebx, 5)},         {"fma", ymm && bit(basic.ecx, 12)},
        {"f16c", ymm && bit(basic.ecx, 29)},           {"avx_vnni", ymm && bit(extended1.eax, 4)},
        {"avx512f", zmm && bit(extended.ebx, 16)},     {"avx512dq", zmm && bit(extended.ebx, 17)},
        {"avx512bw", zmm && bit(extended.ebx, 30)},    {"avx512vl", zmm && bit(extended.ebx, 31)},
        {"avx512_vnni", zmm && bit(extended.ecx, 11)}, {"avx512_bf16", zmm && bit(extended1.eax, 5)},
        {"amx_bf16", tiles && bit(extended.edx, 22)},  {"amx_tile", tiles && bit(extended.edx, 24)},
        {"amx_int8", tiles && bit(extended.edx, 25)},  {"neon", neon},
    };
}

bool reads_one_stream() {
    return one_stream();
}

void use_one_stream(const bool* value) {
    one_stream() = value == nullptr ? is_amd() : *value;
}

}  // namespace moert
