// Rotary position embedding, in the region of an instruction set after pointwise.inl.

void turn(Number number, const uint8_t* x, const float* cos, const float* sin, uint8_t* y, int64_t n) {
    float values[kMostTurned], straight[kMostTurned], turned[kMostTurned];
    const int64_t half = n / 2;
    widen(number, x, values, n);
    for (int64_t i = 0; i < n; ++i) straight[i] = values[i] * cos[i];
    for (int64_t i = 0; i < half; ++i) turned[i] = -values[half + i] * sin[i];
    for (int64_t i = half; i < n; ++i) turned[i] = values[i - half] * sin[i];
    round_numbers(straight, number, n);
    round_numbers(turned, number, n);
    for (int64_t i = 0; i < n; ++i) straight[i] += turned[i];
    narrow(straight, number, y, n);
}
