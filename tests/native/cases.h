// What the kernels are asked: weights, x, and how many of its tokens at once.
#pragma once

#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "weights.h"

struct Case {
    std::string what;
    std::shared_ptr<const Weight> weight;
    std::vector<float> x;  // [most tokens, k]
    std::vector<int> tokens;
};

inline std::vector<Variant> all_variants() {
    std::vector<Variant> variants;
    for (Format format : {Format::kFp32, Format::kBf16, Format::kFp16})
        for (bool transposed : {false, true}) variants.push_back({format, transposed});
    variants.push_back({Format::kFp8, false, 128});
    variants.push_back({Format::kInt8, false, 32});
    for (int group : {32, 128})
        for (bool zeros : {false, true}) variants.push_back({Format::kInt4, false, group, zeros});
    variants.push_back({Format::kMxfp4, false, 32});
    return variants;
}

inline std::vector<float> random_x(int64_t tokens, int64_t k, Random& random) {
    std::vector<float> x(static_cast<size_t>(tokens * k));
    for (float& value : x) value = random.signed_unit();
    // Groups of very different sizes, so that a scale taken from a neighbour is far off.
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t first = 0; first < k; first += 32) {
            const float size = std::ldexp(1.0f, random.between(-6, 6));
            for (int64_t i = first; i < k && i < first + 32; ++i) x[token * k + i] *= size;
        }
    }
    return x;
}

inline std::vector<std::pair<int64_t, int64_t>> shapes(const Variant& variant) {
    if (variant.format == Format::kFp8)
        return {{1, 1}, {3, 5}, {2, 31}, {4, 64}, {17, 127}, {128, 128}, {130, 129}, {33, 200}, {5, 300}, {131, 16}};
    if (variant.group == 32) return {{1, 32}, {2, 64}, {3, 96}, {5, 160}, {16, 288}, {17, 512}, {33, 544}, {7, 1056}};
    if (variant.group == 128) return {{1, 128}, {2, 256}, {3, 384}, {17, 512}, {33, 640}, {5, 1152}};
    return {{1, 1},   {1, 40},  {2, 3},   {3, 17},   {4, 32},   {5, 31}, {7, 64},
            {16, 16}, {17, 65}, {31, 48}, {33, 100}, {35, 257}, {64, 7}, {70, 130}};
}

inline void add_random(const Variant& variant, Random& random, std::vector<Case>* cases) {
    for (const auto& [n, k] : shapes(variant)) {
        const auto weight = std::make_shared<Weight>(random_weight(variant, n, k, random));
        std::vector<int> tokens(40);
        std::iota(tokens.begin(), tokens.end(), 1);
        cases->push_back({"random", weight, random_x(40, k, random), tokens});
    }
}

// Every code with every other scale, and x with one number, so that y is the weight itself: a few of all the tokens at
// once, and each of them alone.
inline void add_every_code(const Variant& variant, std::vector<Case>* cases) {
    const bool halves = variant.format == Format::kBf16 || variant.format == Format::kFp16;
    if (variant.format == Format::kFp32) return;
    const int64_t k = variant.group == 128 ? 128 : 32;
    const int64_t n = halves ? 65536 / k : variant.format == Format::kFp8 || variant.format == Format::kInt8 ? 8 : 256;
    Random random(7);
    auto weight = std::make_shared<Weight>(random_weight(variant, n, k, random));
    for (int64_t i = 0; i < n * k; ++i) weight->codes[i] = static_cast<uint32_t>(i) & (halves ? 0xffff : 0xff);
    for (size_t i = 0; i < weight->zeros.size(); ++i) weight->zeros[i] = i % 16;
    for (int64_t i = 0; i < n * k; ++i) {
        uint32_t& code = weight->codes[i];
        if (variant.format == Format::kInt4 || variant.format == Format::kMxfp4) code &= 0xf;
        if (variant.format == Format::kInt8 && code == 0x80) code = 0x81;
        if (variant.format == Format::kFp8 && (code & 0x7f) == 0x7f) code = 0;
        const double value = halves ? weight->number(i / k, i % k) : 0;
        if (!std::isfinite(value)) code = 0;
    }
    // x is such that no intermediate scale leaves fp32's normal numbers.
    std::vector<float> sizes = {1.0f};
    if (variant.format == Format::kMxfp4) sizes = {0x1p100f, 1.0f, 0x1p-100f};
    for (size_t part = 0; part < sizes.size(); ++part) {
        auto scaled = std::make_shared<Weight>(*weight);
        if (variant.format == Format::kMxfp4) {
            const uint32_t first[] = {0, 20, 234}, last[] = {20, 234, 254};
            for (size_t row = 0; row < scaled->scales.size(); ++row)
                scaled->scales[row] = first[part] + row % (last[part] - first[part] + 1);
        }
        std::vector<float> x(static_cast<size_t>(32 * k));
        for (int64_t token = 0; token < 32; ++token) {
            std::vector<float> one(static_cast<size_t>(k));
            one[token * (k / 32)] = sizes[part];
            std::copy(one.begin(), one.end(), x.begin() + token * k);
            cases->push_back({"one code", scaled, one, {1}});
        }
        cases->push_back({"every code", scaled, x, {32}});
    }
}

// NaN and infinity in x, in the codes or in the scales: where they belong and nowhere else.
inline void add_poison(const Variant& variant, Random& random, std::vector<Case>* cases) {
    const std::vector<uint32_t> nans = {0x7fc00000, 0x7f800001, 0x7fffffff, 0xffffffff};
    for (int round = 0; round < 8; ++round) {
        const int64_t k = variant.format == Format::kFp8 ? 203 : variant.group == 0 ? 75 : 5 * variant.group;
        const int64_t n = variant.format == Format::kFp8 ? 131 : 37;
        auto weight = std::make_shared<Weight>(random_weight(variant, n, k, random));
        std::vector<float> x = random_x(20, k, random);
        const auto column = [&] {
            return round % 2 == 0 ? random.below(static_cast<int>(k)) : static_cast<int>(k) - 1;
        };
        std::memcpy(&x[1 * k + column()], &nans[round % 4], 4);
        x[2 * k + column()] = round % 3 == 0 ? -INFINITY : INFINITY;
        const int64_t row = random.below(static_cast<int>(n)), other = (row + 1) % n;
        uint32_t& code = weight->codes[row * k + column()];
        switch (variant.format) {
            case Format::kFp32:
                code = nans[round % 4];
                weight->codes[other * k + column()] = 0x7f800000;
                break;
            case Format::kBf16:
                code = round % 2 == 0 ? 0x7fc0 : 0xff81;
                weight->codes[other * k + column()] = 0xff80;
                break;
            case Format::kFp16:
                code = round % 2 == 0 ? 0x7e00 : 0xfc01;
                weight->codes[other * k + column()] = 0x7c00;
                break;
            case Format::kFp8:
                code = round % 2 == 0 ? 0x7f : 0xff;
                if (round >= 6) weight->scales[weight->scale_at(n - 1, column())] = 0x7fc00000;
                break;
            case Format::kMxfp4:
                weight->scales[weight->scale_at(row, column())] = 255;
                break;
            default:
                weight->scales[weight->scale_at(row, column())] = round % 2 == 0 ? 0x7e00 : 0xfc01;
        }
        cases->push_back({"NaN and infinity", weight, x, {3, 4, 5, 16, 20}});
    }
}

// Zeros, and numbers so small that a scale for them would be subnormal.
inline void add_small(const Variant& variant, Random& random, std::vector<Case>* cases) {
    const int64_t k = 256, n = 9;
    const auto weight = std::make_shared<Weight>(random_weight(variant, n, k, random));
    std::vector<float> x = random_x(20, k, random);
    for (int64_t i = 0; i < k; ++i) {
        x[0 * k + i] = 0;
        x[1 * k + i] = -0.0f;
        if (i < 64) x[2 * k + i] = 0;
        x[3 * k + i] = std::ldexp(x[3 * k + i], -140);
        if (i >= 64) x[4 * k + i] = std::ldexp(x[4 * k + i], -125);
    }
    cases->push_back({"small", weight, x, {1, 5, 20}});
}

inline std::vector<Case> all_cases(const Variant& variant) {
    Random random(static_cast<uint64_t>(variant.format) * 1000 + static_cast<uint64_t>(variant.group));
    std::vector<Case> cases;
    add_random(variant, random, &cases);
    add_every_code(variant, &cases);
    add_poison(variant, random, &cases);
    add_small(variant, random, &cases);
    return cases;
}
