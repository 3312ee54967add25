// Products of quantised weights with few tokens: lanes run along k. To be included after quantized_pack.inl, with a Vec
// that also has the integer products.

constexpr int8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // twice the value, plus 12

constexpr int kFewTokens = 4;  // that share each line of the weight
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kStreamPrefetchBytes = 6144;

inline void prefetch(const uint8_t* at) {
    __builtin_prefetch(at);
}

// Asks for codes ahead of those at `at`, of which each is to be multiplied with kTokens tokens.
template <int kTokens, bool kOneStream>
inline void prefetch_codes(const uint8_t* at) {
    if (!kOneStream)
        prefetch(at + kPrefetchBytes);
    else if (kTokens > 1)  // the processor's own prefetching lags where each line takes that long
        __builtin_prefetch(at + kStreamPrefetchBytes, 0, 2);
}

template <Kind kKind>
int64_t row_bytes(const Matrix& w) {
    return is_nibbles<kKind>() ? w.k / 2 : w.k;
}

template <Kind kKind>
int64_t scale_bytes(const Matrix& w) {  // of a row
    return w.k / w.group * (kKind == Kind::kMxfp4 ? 1 : 2);
}

// A row of the weight, from some span on.
struct Row {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;
};

template <Kind kKind>
inline Row row_at(const Matrix& w, int64_t row) {
    return {w.data + row * row_bytes<kKind>(w), w.scales + row * scale_bytes<kKind>(w),
            kKind == Kind::kInt4Zeros ? w.zeros + row * (w.k / w.group) : nullptr};
}

template <Kind kKind>
inline Row spans_on(const Matrix& w, const Row& row, int64_t spans) {
    const int64_t groups = spans * (w.group == kGroup ? kLanes : kLanes / 4);
    return {row.codes + spans * lines<kKind>() * kBytes, row.scales + groups * (kKind == Kind::kMxfp4 ? 1 : 2),
            kKind == Kind::kInt4Zeros ? row.zeros + groups : nullptr};
}

template <Kind kKind>
inline void next_span(const Matrix& w, Row& row) {
    row = spans_on<kKind>(w, row, 1);
}

// The scales of the first `groups` groups of a span, a lane each.
template <Kind kKind>
inline Vec::Float scales_of(const Matrix& w, const Row& row, int groups) {
    if (kKind == Kind::kMxfp4) return Vec::powers(row.scales, groups);
    if (w.group == kGroup) return Vec::halves(row.scales, groups);
    return Vec::spread<4>(Vec::halves(row.scales, groups / 4), 0);
}

template <Kind kKind>
inline Vec::Int zeros_of(const Matrix& w, const Row& row, int groups) {
    if (w.group == kGroup) return Vec::bytes(row.zeros, groups);
    return Vec::spread<4>(Vec::bytes(row.zeros, groups / 4), 0);
}

// The codes of a line's even and odd k, as unsigned bytes.
template <Kind kKind>
inline Vec::Int nibbles(Vec::Int codes, bool odd) {
    const Vec::Int plain = odd ? Vec::high_nibbles(codes) : Vec::low_nibbles(codes);
    return kKind == Kind::kMxfp4 ? Vec::look_up(kE2m1, plain) : plain;
}

template <Kind kKind>
constexpr float last_factor() {
    return kKind == Kind::kMxfp4 ? 0.5f : 1.0f;
}

template <Kind kKind, int kTokens, bool kOneStream>
struct FewRow {
    static constexpr int kRun = is_nibbles<kKind>() ? 4 : 8;  // lanes of a group
    static constexpr int kGroupsOfLine = kLanes / kRun;
    static constexpr int kLineBytesOfGroup = kBytes / kGroupsOfLine;

    Row row;
    int64_t scale_bytes;  // of a row
    Vec::Float sums[kTokens];

    // One span, or its first groups if it is the last.
    template <bool kWhole>
    inline __attribute__((always_inline)) void span(const Matrix& w, const uint8_t* x, int64_t x_stride, int groups) {
        Vec::Float scales[kTokens];
        const Vec::Float of_row = scales_of<kKind>(w, row, kWhole ? kLanes : groups);
        for (int token = 0; token < kTokens; ++token)
            scales[token] = Vec::mul(of_row, Vec::load(reinterpret_cast<const float*>(x + token * x_stride + kSpan +
                                                                                      lines<kKind>() * kBytes)));
        if (!kOneStream)
            prefetch(row.scales + scale_bytes);
        else if (kTokens == 1)  // a line now and then has the processor's own prefetching go on across pages
            __builtin_prefetch(row.codes + kStreamPrefetchBytes, 0, 2);
        Vec::Int zeros = Vec::zero();
        if (kKind == Kind::kInt4Zeros) zeros = zeros_of<kKind>(w, row, kWhole ? kLanes : groups);
        const int count = kWhole ? lines<kKind>() : (groups + kGroupsOfLine - 1) / kGroupsOfLine;
#pragma GCC unroll 8
        for (int line = 0; line < count; ++line) {
            const uint8_t* from = row.codes + line * kBytes;
            prefetch_codes<kTokens, kOneStream>(from);
            const int first = line * kGroupsOfLine;
            const Vec::Int codes =
                kWhole ? Vec::load(from) : Vec::load_some(from, int64_t{groups - first} * kLineBytesOfGroup);
            const Vec::Int zero = kKind == Kind::kInt4Zeros ? Vec::spread<kRun>(zeros, first) : zeros;
            for (int token = 0; token < kTokens; ++token) {
                const Vec::Float dot = Vec::to_float(product(codes, zero, x + token * x_stride, line));
                sums[token] = Vec::fma(dot, Vec::spread<kRun>(scales[token], first), sums[token]);
            }
        }
        next_span<kKind>(w, row);
    }

  private:
    // Of a line of the weight and one of x, exactly, in each lane.
    static inline __attribute__((always_inline)) Vec::Int product(Vec::Int codes, Vec::Int zero, const uint8_t* x,
                                                                  int line) {
        const Vec::Int shortfall = Vec::load(x + kSpan + line * kBytes);
        if (kKind == Kind::kInt8) {
            const Vec::Int from = Vec::kBiased ? shortfall : Vec::zero();
            return Vec::dot_int8(from, Vec::int8_codes(codes), Vec::load(x + line * kBytes));
        }
        const Vec::Int from = kKind == Kind::kInt4Zeros ? Vec::multiply(zero, shortfall) : shortfall;
        return Vec::dot_pair(from, nibbles<kKind>(codes, false), Vec::load(x + 2 * line * kBytes),
                             nibbles<kKind>(codes, true), Vec::load(x + (2 * line + 1) * kBytes));
    }
};

// Row by row, so that the weight is read as one stream: streams side by side are slower by more than sharing loads of x
// between rows saves.
template <Kind kKind, int kTokens, bool kOneStream>
inline void few_tokens_as(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, float* y,
                          int64_t y_stride) {
    const int64_t stride = few_token_bytes<kKind>(w.k), whole = w.k / kSpan;
    const int rest = static_cast<int>((w.k - whole * kSpan) / kGroup);
    const int64_t code_bytes = row_bytes<kKind>(w), row_scales = scale_bytes<kKind>(w), row_zeros = w.k / w.group;
    Row at = row_at<kKind>(w, begin);
    for (int64_t row = begin; row < end; ++row) {
        FewRow<kKind, kTokens, kOneStream> product;
        product.row = at;
        product.scale_bytes = row_scales;
        for (int token = 0; token < kTokens; ++token) product.sums[token] = Vec::broadcast(0);
        const uint8_t* x = packed;
        for (int64_t span = 0; span < whole; ++span, x += few_span_bytes<kKind>())
            product.template span<true>(w, x, stride, kLanes);
        if (rest > 0) product.template span<false>(w, x, stride, rest);
        for (int token = 0; token < kTokens; ++token)
            y[token * y_stride + row - begin] = Vec::sum(product.sums[token]) * last_factor<kKind>();
        at.codes += code_bytes;
        at.scales += row_scales;
        if (kKind == Kind::kInt4Zeros) at.zeros += row_zeros;
    }
}

template <Kind kKind, int kTokens>
void few_tokens(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, float* y, int64_t y_stride) {
    if (reads_one_stream())
        few_tokens_as<kKind, kTokens, true>(w, begin, end, packed, y, y_stride);
    else
        few_tokens_as<kKind, kTokens, false>(w, begin, end, packed, y, y_stride);
}

template <Kind kKind>
void few_rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
              int64_t y_stride) {
    const int64_t token_bytes = few_token_bytes<kKind>(w.k);  // blocks are full but for the last: tokens at one stride
    for (int64_t token = 0; token < tokens; token += kFewTokens) {
        const uint8_t* x = packed + token * token_bytes;
        float* to = y + token * y_stride;
        switch (tokens - token) {
            case 1:
                few_tokens<kKind, 1>(w, begin, end, x, to, y_stride);
                break;
            case 2:
                few_tokens<kKind, 2>(w, begin, end, x, to, y_stride);
                break;
            case 3:
                few_tokens<kKind, 3>(w, begin, end, x, to, y_stride);
                break;
            default:
                few_tokens<kKind, 4>(w, begin, end, x, to, y_stride);
        }
    }
}
