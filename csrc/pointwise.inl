// Plain C++ that the compiler vectorises for the region it is included in (an anonymous namespace), after
// `widen_fp16(from, to, n)` and `narrow_fp16(from, to, n)`.

inline float low_part(float x, float limit) {
    return x > limit ? limit : x;
}

inline float high_part(float x, float limit) {
    return x < limit ? limit : x;
}

// Within 2 units in the last place; overflows to infinity, underflows through the subnormals to 0.
inline float exponential(float x) {
    const float bounded = high_part(low_part(x, 89.0f), -104.0f);
    const float shifted = bounded * 1.44269504088896341f + 12582912.0f;  // rounds to a whole number in the low bits
    const float whole = shifted - 12582912.0f;
    const float rest = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    const int32_t power = static_cast<int32_t>(float_to_bits(shifted) - 0x4b400000u);
    const int32_t half = power >> 1;
    const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
    const float second = bits_to_float(static_cast<uint32_t>(power - half + 127) << 23);
    return p * first * second;
}

template <Curve kCurve>
inline float curve(float x, float alpha) {
    switch (kCurve) {
        case Curve::kSilu:
            return x / (1.0f + exponential(-alpha * x));
        case Curve::kSigmoid:
            return 1.0f / (1.0f + exponential(-x));
        case Curve::kGeluTanh: {
            // 0.5 (1 + tanh z) = sigmoid(2 z)
            const float z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
            return x / (1.0f + exponential(-2.0f * z));
        }
        case Curve::kGelu:
            return x * 0.5f * (1.0f + __builtin_erff(x * 0.7071067811865476f));
        case Curve::kTanh:
            return __builtin_tanhf(x);
        case Curve::kRelu:
            return high_part(x, 0.0f);
        case Curve::kRelu2:
            return high_part(x, 0.0f) * high_part(x, 0.0f);
        default:
            return x;
    }
}

template <Curve kCurve>
void gate_with(const Gate& gate, const float* g, const float* u, int64_t step, float* h, int64_t n) {
    const float alpha = gate.alpha, gate_limit = gate.gate_limit, up_limit = gate.up_limit, offset = gate.up_offset,
                output_limit = gate.output_limit;
    if (!gate.gated) {
        for (int64_t i = 0; i < n; ++i) h[i] = low_part(curve<kCurve>(g[i], alpha), output_limit);
    } else if (step == 1) {
        for (int64_t i = 0; i < n; ++i)
            h[i] = low_part(curve<kCurve>(low_part(g[i], gate_limit), alpha), output_limit) *
                   (high_part(low_part(u[i], up_limit), -up_limit) + offset);
    } else {
        for (int64_t i = 0; i < n; ++i)
            h[i] = low_part(curve<kCurve>(low_part(g[2 * i], gate_limit), alpha), output_limit) *
                   (high_part(low_part(u[2 * i], up_limit), -up_limit) + offset);
    }
}

void gate_numbers(const Gate& gate, const float* g, const float* u, int64_t step, float* h, int64_t n) {
    switch (gate.curve) {
        case Curve::kIdentity:
            return gate_with<Curve::kIdentity>(gate, g, u, step, h, n);
        case Curve::kSilu:
            return gate_with<Curve::kSilu>(gate, g, u, step, h, n);
        case Curve::kGelu:
            return gate_with<Curve::kGelu>(gate, g, u, step, h, n);
        case Curve::kGeluTanh:
            return gate_with<Curve::kGeluTanh>(gate, g, u, step, h, n);
        case Curve::kRelu:
            return gate_with<Curve::kRelu>(gate, g, u, step, h, n);
        case Curve::kRelu2:
            return gate_with<Curve::kRelu2>(gate, g, u, step, h, n);
        case Curve::kSigmoid:
            return gate_with<Curve::kSigmoid>(gate, g, u, step, h, n);
        case Curve::kTanh:
            return gate_with<Curve::kTanh>(gate, g, u, step, h, n);
    }
}

void widen(Number from_number, const uint8_t* from, float* to, int64_t n) {
    if (from_number == Number::kFp32) {
        __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    } else if (from_number == Number::kFp16) {
        widen_fp16(from, to, n);
    } else {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
        for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(halves[i]);
    }
}

void narrow(const float* from, Number to_number, uint8_t* to, int64_t n) {
    if (to_number == Number::kFp32) {
        __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    } else if (to_number == Number::kFp16) {
        narrow_fp16(from, to, n);
    } else {
        uint16_t* halves = reinterpret_cast<uint16_t*>(to);
        for (int64_t i = 0; i < n; ++i) halves[i] = float_to_bf16(from[i]);
    }
}

void round_numbers(float* values, Number number, int64_t n) {
    if (number == Number::kBf16) {
        for (int64_t i = 0; i < n; ++i) values[i] = bf16_to_float(float_to_bf16(values[i]));
    } else if (number == Number::kFp16) {
        uint8_t halves[2 * 64];
        for (int64_t i = 0; i < n; i += 64) {
            const int64_t count = n - i < 64 ? n - i : 64;
            narrow_fp16(values + i, halves, count);
            widen_fp16(halves, values + i, count);
        }
    }
}

void add(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

void add_weighted(float* to, const float* from, float weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i] * weight;
}

// The products of 16 numbers are added up apart, so that the compiler may do them at once.
float dot(Number number, const uint8_t* w, const float* x, int64_t n) {
    float sums[16] = {}, wide[64];
    for (int64_t begin = 0; begin < n; begin += 64) {
        const int64_t count = n - begin < 64 ? n - begin : 64;
        widen(number, w + begin * bytes_of(number), wide, count);
        int64_t i = 0;
        for (; i + 16 <= count; i += 16)
            for (int64_t j = 0; j < 16; ++j) sums[j] += wide[i + j] * x[begin + i + j];
        for (; i < count; ++i) sums[0] += wide[i] * x[begin + i];
    }
    for (int64_t half = 8; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    return sums[0];
}
