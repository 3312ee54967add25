#include "isa.h"

#include <cstring>
#include <initializer_list>
#include <vector>

#include "cpu.h"
#include "pointwise.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moert {
namespace {

#if defined(__x86_64__)

bool has(std::initializer_list<const char*> names) {
    const std::vector<CpuFeature> features = cpu_features();
    for (const char* name : names) {
        bool found = false;
        for (const CpuFeature& feature : features)
            found = found || (feature.usable && std::strcmp(feature.name, name) == 0);
        if (!found) return false;
    }
    return true;
}

bool has_avx2() {
    return has({"avx2", "fma", "f16c"});
}

bool has_avx512() {
    return has_avx2() && has({"avx512f", "avx512bw", "avx512vl", "avx512dq"});
}

bool has_avx512_vnni() {
    return has_avx512() && has({"avx512_vnni"});
}

bool has_avx512_bf16() {
    return has_avx512_vnni() && has({"avx512_bf16"});
}

bool has_amx() {
    if (!has_avx512_bf16() || !has({"amx_tile", "amx_bf16"})) return false;
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

#endif

struct Level {
    const char* name;
    bool (*usable)();
    const Pointwise* pointwise;
    Select selects[2];
};

// Best first; each may use those after it.
const Level kLevels[] = {
#if defined(__x86_64__)
    {"amx", has_amx, &kPointwiseAvx512, {amx, nullptr}},
    {"avx512_bf16", has_avx512_bf16, &kPointwiseAvx512, {float_avx512_bf16, nullptr}},
    {"avx512_vnni", has_avx512_vnni, &kPointwiseAvx512, {quantized_avx512_vnni, nullptr}},
    {"avx512", has_avx512, &kPointwiseAvx512, {float_avx512, quantized_avx512}},
    {"avx2", has_avx2, &kPointwiseAvx2, {float_avx2, quantized_avx2}},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, &kPointwiseScalar, {float_neon, quantized_neon}},
#endif
    {"scalar", [] { return true; }, &kPointwiseScalar, {float_scalar, quantized_scalar}},
};

constexpr int kLast = static_cast<int>(sizeof kLevels / sizeof kLevels[0]) - 1;

int best_level() {
    int level = 0;
    while (!kLevels[level].usable()) ++level;  // scalar always is
    return level;
}

int& level_in_use() {
    static int level = best_level();
    return level;
}

}  // namespace

bool use_isa(const char* name) {
    if (name == nullptr) {
        level_in_use() = best_level();
        return true;
    }
    for (int level = 0; level <= kLast; ++level) {
        if (std::strcmp(kLevels[level].name, name) == 0 && kLevels[level].usable()) {
            level_in_use() = level;
            return true;
        }
    }
    return false;
}

const char* isa() {
    return kLevels[level_in_use()].name;
}

std::string isa_names(bool usable_only) {
    std::string names;
    for (const Level& level : kLevels) {
        if (usable_only && !level.usable()) continue;
        names += (names.empty() ? "" : " ");
        names += level.name;
    }
    return names;
}

const Kernel& find_kernel(const Matrix& w, int64_t tokens) {
    for (int level = level_in_use(); level <= kLast; ++level) {
        for (Select select : kLevels[level].selects) {
            const Kernel* kernel = select == nullptr ? nullptr : select(w, tokens);
            if (kernel != nullptr) return *kernel;
        }
    }
    __builtin_unreachable();  // the scalar level has a kernel for every format
}

const Pointwise& pointwise() {
    return *kLevels[level_in_use()].pointwise;
}

}  // namespace moert
