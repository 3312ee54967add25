#include "linear.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moert {
namespace {

constexpr int kRows = 4;    // rows of the weight that share each load of x
constexpr int kTokens = 4;  // rows of x that share each load of the weight

float to_float(Half type, uint16_t bits) {
    if (type == Half::kBf16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ff;
    uint32_t wide;
    if (exponent == 0x1f) {
        wide = sign | 0x7f800000u | (fraction << 13);
    } else if (exponent != 0) {
        wide = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        float subnormal = static_cast<float>(fraction) * 0x1p-24f;
        std::memcpy(&wide, &subnormal, sizeof wide);
        wide |= sign;
    }
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// A block of up to kRows x kTokens outputs. The tail of k is added after the vector part, in order.
using Block = void (*)(Half, const uint16_t*, const float*, float*, int64_t k, int64_t y_stride, int rows, int tokens);

void block_scalar(Half type, const uint16_t* weight, const float* x, float* y, int64_t k, int64_t y_stride, int rows,
                  int tokens) {
    for (int token = 0; token < tokens; ++token) {
        for (int row = 0; row < rows; ++row) {
            float sum = 0;
            for (int64_t i = 0; i < k; ++i) sum += to_float(type, weight[row * k + i]) * x[token * k + i];
            y[token * y_stride + row] = sum;
        }
    }
}

#if defined(__x86_64__)

float tail(Half type, const uint16_t* weight, const float* x, int64_t begin, int64_t k, float sum) {
    for (int64_t i = begin; i < k; ++i) sum += to_float(type, weight[i]) * x[i];
    return sum;
}

template <Half kType>
__attribute__((target("avx512f"))) inline __m512 load16(const uint16_t* weight) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
    if (kType == Half::kFp16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <Half kType, int kR, int kT>
__attribute__((target("avx512f"))) void block_avx512_of(const uint16_t* weight, const float* x, float* y, int64_t k,
                                                        int64_t y_stride) {
    __m512 sums[kR][kT];
    for (int row = 0; row < kR; ++row)
        for (int token = 0; token < kT; ++token) sums[row][token] = _mm512_setzero_ps();
    const int64_t whole = k & ~int64_t{15};
    for (int64_t i = 0; i < whole; i += 16) {
        __m512 values[kT];
        for (int token = 0; token < kT; ++token) values[token] = _mm512_loadu_ps(x + token * k + i);
        for (int row = 0; row < kR; ++row) {
            _mm_prefetch(reinterpret_cast<const char*>(weight + row * k + i) + 1024, _MM_HINT_T0);
            const __m512 w = load16<kType>(weight + row * k + i);
            for (int token = 0; token < kT; ++token)
                sums[row][token] = _mm512_fmadd_ps(w, values[token], sums[row][token]);
        }
    }
    for (int row = 0; row < kR; ++row)
        for (int token = 0; token < kT; ++token)
            y[token * y_stride + row] =
                tail(kType, weight + row * k, x + token * k, whole, k, _mm512_reduce_add_ps(sums[row][token]));
}

template <Half kType>
__attribute__((target("avx2,fma,f16c"))) inline __m256 load8(const uint16_t* weight) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight));
    if (kType == Half::kFp16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

__attribute__((target("avx2,fma,f16c"))) inline float reduce8(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

template <Half kType, int kR, int kT>
__attribute__((target("avx2,fma,f16c"))) void block_avx2_of(const uint16_t* weight, const float* x, float* y, int64_t k,
                                                            int64_t y_stride) {
    __m256 sums[kR][kT];
    for (int row = 0; row < kR; ++row)
        for (int token = 0; token < kT; ++token) sums[row][token] = _mm256_setzero_ps();
    const int64_t whole = k & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) {
        for (int row = 0; row < kR; ++row) {
            _mm_prefetch(reinterpret_cast<const char*>(weight + row * k + i) + 1024, _MM_HINT_T0);
            const __m256 w = load8<kType>(weight + row * k + i);
            for (int token = 0; token < kT; ++token)
                sums[row][token] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + token * k + i), sums[row][token]);
        }
    }
    for (int row = 0; row < kR; ++row)
        for (int token = 0; token < kT; ++token)
            y[token * y_stride + row] =
                tail(kType, weight + row * k, x + token * k, whole, k, reduce8(sums[row][token]));
}

// The block's shape as template parameters, so that its sums stay in registers.
#define MOERT_BLOCK_OF_SHAPE(name)                                                                                  \
    template <Half kType, int kR>                                                                                   \
    void name##_tokens(const uint16_t* weight, const float* x, float* y, int64_t k, int64_t y_stride, int tokens) { \
        switch (tokens) {                                                                                           \
            case 1:                                                                                                 \
                return name##_of<kType, kR, 1>(weight, x, y, k, y_stride);                                          \
            case 2:                                                                                                 \
                return name##_of<kType, kR, 2>(weight, x, y, k, y_stride);                                          \
            case 3:                                                                                                 \
                return name##_of<kType, kR, 3>(weight, x, y, k, y_stride);                                          \
            default:                                                                                                \
                return name##_of<kType, kR, 4>(weight, x, y, k, y_stride);                                          \
        }                                                                                                           \
    }                                                                                                               \
    template <Half kType>                                                                                           \
    void name##_rows(const uint16_t* weight, const float* x, float* y, int64_t k, int64_t y_stride, int rows,       \
                     int tokens) {                                                                                  \
        if (rows == kRows) return name##_tokens<kType, kRows>(weight, x, y, k, y_stride, tokens);                   \
        for (int row = 0; row < rows; ++row)                                                                        \
            name##_tokens<kType, 1>(weight + row * k, x, y + row, k, y_stride, tokens);                             \
    }                                                                                                               \
    void name(Half type, const uint16_t* weight, const float* x, float* y, int64_t k, int64_t y_stride, int rows,   \
              int tokens) {                                                                                         \
        if (type == Half::kBf16) return name##_rows<Half::kBf16>(weight, x, y, k, y_stride, rows, tokens);          \
        return name##_rows<Half::kFp16>(weight, x, y, k, y_stride, rows, tokens);                                   \
    }

MOERT_BLOCK_OF_SHAPE(block_avx512)
MOERT_BLOCK_OF_SHAPE(block_avx2)
#undef MOERT_BLOCK_OF_SHAPE

#endif  // __x86_64__

struct Isa {
    const char* name;
    bool (*usable)();
    Block block;
};

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", [] { return __builtin_cpu_supports("avx512f") != 0; }, block_avx512},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     block_avx2},
#endif
    {"scalar", [] { return true; }, block_scalar},
};

const Isa* best_isa() {
    for (const Isa& isa : kIsas)
        if (isa.usable()) return &isa;
    return nullptr;  // not reached: scalar is usable
}

const Isa* chosen_isa = best_isa();

}  // namespace

void linear(Half type, const uint16_t* weight, const float* x, float* y, int64_t t, int64_t n, int64_t k) {
    const Block block = chosen_isa->block;
    for (int64_t row = 0; row < n; row += kRows) {
        const int rows = static_cast<int>(n - row < kRows ? n - row : kRows);
        for (int64_t token = 0; token < t; token += kTokens) {
            const int tokens = static_cast<int>(t - token < kTokens ? t - token : kTokens);
            block(type, weight + row * k, x + token * k, y + token * n + row, k, n, rows, tokens);
        }
    }
}

bool use_isa(const char* name) {
    if (name == nullptr) {
        chosen_isa = best_isa();
        return true;
    }
    for (const Isa& isa : kIsas) {
        if (std::strcmp(isa.name, name) == 0 && isa.usable()) {
            chosen_isa = &isa;
            return true;
        }
    }
    return false;
}

const char* isa() {
    return chosen_isa->name;
}

}  // namespace moert
