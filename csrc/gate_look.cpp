#include "gate_look.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moert {

void scale_to_one(const float* x, float eps, float* y, int64_t width) {
    const float square = pointwise().dot(Number::kFp32, reinterpret_cast<const uint8_t*>(x), x, width);
    const float r = 1.0f / std::sqrt(square / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * r;
}

void look(const LookedAt& router, const Lines& lines, const float* x, float* values) {
    std::vector<float> line;
    if (lines.gain != nullptr) {
        line.resize(static_cast<size_t>(router.width));
        for (int64_t i = 0; i < router.width; ++i)
            line[static_cast<size_t>(i)] = lines.offset[i] + lines.gain[i] * x[i];
        x = line.data();
    }
    const Pointwise& of = pointwise();
    const int64_t row_bytes = router.width * bytes_of(router.number);
    for (int64_t e = 0; e < router.experts; ++e) {
        float value = of.dot(router.number, router.weight + e * row_bytes, x, router.width);
        if (router.bias != nullptr) value += router.bias[e];
        if (router.correction != nullptr) value = 1.0f / (1.0f + std::exp(-value)) + router.correction[e];
        values[e] = value;
    }
}

std::vector<int64_t> best_first(const float* values, int64_t n, int64_t count) {
    if (count == 0 || std::any_of(values, values + n, [](float value) { return std::isnan(value); })) return {};
    std::vector<int64_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + count, order.end(),
                      [&](int64_t a, int64_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); });
    order.resize(static_cast<size_t>(count));
    if (std::isinf(values[order[0]])) return {};
    return order;
}

bool learn_lines(const float* x, const float* y, int64_t width, float share, bool moments_too, float* means,
                 float* moments, float* gain, float* offset) {
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += x[i] + y[i];
    if (!std::isfinite(sum)) return false;
    float *mean_y = means + width, *both = moments + width;
    for (int64_t i = 0; i < width; ++i) {
        const float apart = x[i] - means[i], apart_y = y[i] - mean_y[i];
        means[i] += share * apart;
        mean_y[i] += share * apart_y;
        if (moments_too) {
            moments[i] += share * (apart * apart - moments[i]);
            both[i] += share * (apart * apart_y - both[i]);
        }
        if (moments[i] > 0) gain[i] = both[i] / moments[i];
        offset[i] = mean_y[i] - gain[i] * means[i];
    }
    return true;
}

}  // namespace moert
