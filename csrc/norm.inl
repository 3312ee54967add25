// Norms, in the region of an instruction set after pointwise.inl.

// As many sums as keep the additions of any instruction set busy; always as many, so that all give the same bits.
constexpr int64_t kSums = 32;
constexpr int64_t kNormBlock = 256;

double sum_of_squares(Number number, const uint8_t* x, int64_t n) {
    float values[kNormBlock];
    double sums[kSums] = {};
    for (int64_t begin = 0; begin < n; begin += kNormBlock) {
        const int64_t count = n - begin < kNormBlock ? n - begin : kNormBlock;
        widen(number, x + begin * bytes_of(number), values, count);
        int64_t i = 0;
        for (; i + kSums <= count; i += kSums)
            for (int64_t lane = 0; lane < kSums; ++lane)
                sums[lane] += static_cast<double>(values[i + lane] * values[i + lane]);
        for (int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += static_cast<double>(values[i] * values[i]);
    }
    for (int64_t half = kSums / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

void normalise(const Norm& norm, const uint8_t* x, uint8_t* y) {
    const int64_t n = norm.width, size = bytes_of(norm.number);
    const float mean = static_cast<float>(sum_of_squares(norm.number, x, n)) / static_cast<float>(n);
    const float factor = 1.0f / __builtin_sqrtf(mean + norm.eps);
    float values[kNormBlock], weights[kNormBlock];
    for (int64_t begin = 0; begin < n; begin += kNormBlock) {
        const int64_t count = n - begin < kNormBlock ? n - begin : kNormBlock;
        widen(norm.number, x + begin * size, values, count);
        widen(norm.number, norm.weight + begin * size, weights, count);
        for (int64_t i = 0; i < count; ++i) values[i] *= factor;
        if (norm.scale == Scale::kAfterRounding) round_numbers(values, norm.number, count);
        if (norm.scale == Scale::kOnePlus)
            for (int64_t i = 0; i < count; ++i) weights[i] += 1.0f;
        for (int64_t i = 0; i < count; ++i) values[i] *= weights[i];
        narrow(values, norm.number, y + begin * size, count);
    }
}
