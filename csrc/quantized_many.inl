// Products of quantised weights with many tokens: lanes run along the rows of the weight, whose codes are decoded a
// span at a time for all tokens. To be included after quantized_few.inl.

constexpr int kManyTokens = 4 * kTokenBlock;  // that share a decoded span

// A span of kLanes rows, with the rows in lanes.
struct ManySpan {
    alignas(64) uint8_t codes[kLanes * kSteps][kBytes];
    alignas(64) float scales[kLanes][kLanes];
    alignas(64) int32_t zeros[kLanes][kLanes];
};

template <Kind kKind>
inline void decode_span(const Matrix& w, Row (&rows)[kLanes], int groups, ManySpan& span) {
    Vec::Int columns[kLanes];
    const int64_t bytes = int64_t{groups} * kGroup / (is_nibbles<kKind>() ? 2 : 1);
    for (int line = 0; line < lines<kKind>() && line * kBytes < bytes; ++line) {
        for (int row = 0; row < kLanes; ++row)
            columns[row] = Vec::load_some(rows[row].codes + line * kBytes, bytes - line * kBytes);
        Vec::transpose(columns);
        for (int i = 0; i < kLanes; ++i) {
            if (is_nibbles<kKind>()) {
                uint8_t* to = span.codes[2 * (line * kLanes + i)];
                Vec::store(to, nibbles<kKind>(columns[i], false));
                Vec::store(to + kBytes, nibbles<kKind>(columns[i], true));
            } else {
                Vec::store(span.codes[line * kLanes + i], Vec::int8_codes(columns[i]));
            }
        }
    }
    for (int row = 0; row < kLanes; ++row) columns[row] = Vec::bits(scales_of<kKind>(w, rows[row], groups));
    Vec::transpose(columns);
    for (int group = 0; group < kLanes; ++group) Vec::store(static_cast<void*>(span.scales[group]), columns[group]);
    if (kKind == Kind::kInt4Zeros) {
        for (int row = 0; row < kLanes; ++row) columns[row] = zeros_of<kKind>(w, rows[row], groups);
        Vec::transpose(columns);
        for (int group = 0; group < kLanes; ++group) Vec::store(static_cast<void*>(span.zeros[group]), columns[group]);
    }
}

// What is to be fetched while a span is used, as much as that: the rows' next spans or, for one stream, what lies as
// far into the rows after these, from one end to the other.
struct Ahead {
    const uint8_t* codes[kLanes];
    const uint8_t* scales[kLanes];
};

template <Kind kKind>
inline void prefetch_span(const Ahead& ahead, int row) {
    for (int line = 0; line < lines<kKind>(); ++line) __builtin_prefetch(ahead.codes[row] + line * kBytes, 0, 2);
    __builtin_prefetch(ahead.scales[row], 0, 2);
}

// sums[token] += a span's product with the kTokens tokens of a tile, of which `x` is the same span.
template <Kind kKind, int kTokens>
inline void many_tile(const ManySpan& span, int groups, const uint8_t* x, const Ahead* ahead, float (*to)[kLanes]) {
    const int32_t* shortfalls = reinterpret_cast<const int32_t*>(x + kManyCodes);
    const float* scales = reinterpret_cast<const float*>(x + kManyCodes + kManyNumbers);
    Vec::Float sums[kTokens];
    for (int token = 0; token < kTokens; ++token) sums[token] = Vec::load(to[token]);
    for (int group = 0; group < groups; ++group) {
        if (ahead != nullptr)
            for (int row = group * kLanes / groups; row < (group + 1) * kLanes / groups; ++row)
                prefetch_span<kKind>(*ahead, row);
        Vec::Int dots[kTokens];
        for (int token = 0; token < kTokens; ++token) {
            if (kKind == Kind::kInt8 && !Vec::kBiased) {
                dots[token] = Vec::zero();
                continue;
            }
            dots[token] = Vec::broadcast_int(shortfalls + group * kTile + token);
            if (kKind == Kind::kInt4Zeros) dots[token] = Vec::multiply(Vec::load(span.zeros[group]), dots[token]);
        }
#pragma GCC unroll 4
        for (int step = 0; step < kSteps; step += 2) {
            const Vec::Int w0 = Vec::load(span.codes[group * kSteps + step]);
            const Vec::Int w1 = Vec::load(span.codes[group * kSteps + step + 1]);
            const uint8_t* codes = x + (group * kSteps + step) * kTile * 4;
            for (int token = 0; token < kTokens; ++token) {
                const Vec::Int x0 = Vec::broadcast_int(codes + token * 4);
                const Vec::Int x1 = Vec::broadcast_int(codes + (kTile + token) * 4);
                if (kKind == Kind::kInt8)
                    dots[token] = Vec::dot_int8(Vec::dot_int8(dots[token], w0, x0), w1, x1);
                else
                    dots[token] = Vec::dot_pair(dots[token], w0, x0, w1, x1);
            }
        }
        const Vec::Float scale = Vec::load(span.scales[group]);
        for (int token = 0; token < kTokens; ++token)
            sums[token] = Vec::fma(Vec::to_float(dots[token]),
                                   Vec::mul(scale, Vec::broadcast(scales[group * kTile + token])), sums[token]);
    }
    for (int token = 0; token < kTokens; ++token) Vec::store(to[token], sums[token]);
}

template <Kind kKind>
inline void many_tile_of(int tokens, const ManySpan& span, int groups, const uint8_t* x, const Ahead* ahead,
                         float (*to)[kLanes]) {
    switch (tokens) {
        case 1:
            return many_tile<kKind, 1>(span, groups, x, ahead, to);
        case 2:
            return many_tile<kKind, 2>(span, groups, x, ahead, to);
        case 3:
            return many_tile<kKind, 3>(span, groups, x, ahead, to);
        case 4:
            return many_tile<kKind, 4>(span, groups, x, ahead, to);
        case 5:
            return many_tile < kKind, kTile<5 ? kTile : 5>(span, groups, x, ahead, to);
        case 6:
            return many_tile < kKind, kTile<6 ? kTile : 6>(span, groups, x, ahead, to);
        case 7:
            return many_tile < kKind, kTile<7 ? kTile : 7>(span, groups, x, ahead, to);
        default:
            return many_tile<kKind, kTile>(span, groups, x, ahead, to);
    }
}

// The products of up to kLanes rows and kManyTokens tokens.
template <Kind kKind>
void many_rows_block(const Matrix& w, int64_t begin, int count, bool is_first, bool is_last, bool one_stream,
                     const uint8_t* packed, int tokens, float* y, int64_t y_stride) {
    alignas(64) float sums[kManyTokens][kLanes];
    for (int token = 0; token < tokens; ++token) Vec::store(sums[token], Vec::broadcast(0));
    ManySpan span;
    Row rows[kLanes];
    Ahead ahead;
    // Missing rows are taken for the last one: its numbers are there, and what comes of them is left.
    for (int row = 0; row < kLanes; ++row) {
        rows[row] = row_at<kKind>(w, begin + (row < count ? row : count - 1));
        ahead.codes[row] = rows[row].codes;
        ahead.scales[row] = rows[row].scales;
        if (is_first) prefetch_span<kKind>(ahead, row);
    }
    const int64_t groups = w.k / kGroup;
    const Row rows_after = row_at<kKind>(w, begin + kLanes);
    for (int64_t group = 0; group < groups; group += kLanes) {
        const int some = static_cast<int>(groups - group < kLanes ? groups - group : kLanes);
        decode_span<kKind>(w, rows, some, span);
        const bool is_end = group + kLanes >= groups;
        for (int row = 0; row < kLanes; ++row) {
            next_span<kKind>(w, rows[row]);
            const Row next = one_stream ? spans_on<kKind>(w, rows_after, group + row)
                             : is_end   ? row_at<kKind>(w, begin + kLanes + row)
                                        : rows[row];
            ahead.codes[row] = next.codes;
            ahead.scales[row] = next.scales;
        }
        const Ahead* to_prefetch = is_last && (is_end || one_stream) ? nullptr : &ahead;
        const uint8_t* block = packed + group / kLanes * kManySpanBytes;
        for (int first = 0; first < tokens; first += kTokenBlock, block += many_block_bytes(w.k)) {
            const int of_block = tokens - first < kTokenBlock ? tokens - first : kTokenBlock;
            const int each = tile_tokens(of_block);
            const uint8_t* x = block;
            for (int token = 0; token < of_block; token += each, x += many_tile_bytes(w.k)) {
                many_tile_of<kKind>(token + each < of_block ? each : of_block - token, span, some, x, to_prefetch,
                                    sums + first + token);
                to_prefetch = nullptr;
            }
        }
    }
    for (int token = 0; token < tokens; ++token)
        for (int row = 0; row < count; ++row) y[token * y_stride + row] = sums[token][row] * last_factor<kKind>();
}

template <Kind kKind>
void many_rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
               int64_t y_stride) {
    const bool one_stream = reads_one_stream();
    for (int64_t token = 0; token < tokens; token += kManyTokens) {
        const int some = static_cast<int>(tokens - token < kManyTokens ? tokens - token : kManyTokens);
        const uint8_t* x = packed + token / kTokenBlock * many_block_bytes(w.k);
        for (int64_t row = begin; row < end; row += kLanes) {
            const int count = static_cast<int>(end - row < kLanes ? end - row : kLanes);
            many_rows_block<kKind>(w, row, count, row == begin, row + kLanes >= end, one_stream, x, some,
                                   y + token * y_stride + row - begin, y_stride);
        }
    }
}
