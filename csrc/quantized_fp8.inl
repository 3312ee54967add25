// Products of fp8 weights: x stays fp32, lanes run along k. To be included after quantized_few.inl.
//
// x is packed with zeros up to a multiple of kFp8Block, every 32 numbers in the order in which e4m3 codes are decoded:
// 0..7, 16..23, 8..15, 24..31. For few tokens all of a token's numbers lie side by side, for many all tokens' numbers
// of the same kFp8Block of k: either way what a kernel goes over again and again is contiguous and stays in the first
// cache. Codes are decoded to values times 2^-8.

constexpr int kBlockLines = static_cast<int>(kFp8Block) / kBytes;
constexpr int kVectors = static_cast<int>(kFp8Block) / kLanes;
constexpr int64_t kBlockFloats = kTokenBlock * kFp8Block;  // of x in a block of k
constexpr float kE4m3Factor = 256;

inline int64_t fp8_blocks(int64_t k) {
    return (k + kFp8Block - 1) / kFp8Block;
}

int64_t fp8_block_bytes(int64_t k) {
    return fp8_blocks(k) * kBlockFloats * static_cast<int64_t>(sizeof(float));
}

template <bool kMany>
void fp8_pack(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int64_t first = 0; first < k; first += kFp8Block) {
        for (int token = 0; token < tokens; ++token) {
            const float* from = x + token * k + first;
            float* to = reinterpret_cast<float*>(block) +
                        (kMany ? first * kTokenBlock + token * kFp8Block : token * fp8_blocks(k) * kFp8Block + first);
            for (int64_t i = 0; i < kFp8Block; i += 8) {
                const int64_t source = i % 32 == 8 ? i + 8 : i % 32 == 16 ? i - 8 : i;
                for (int64_t j = 0; j < 8; ++j) to[i + j] = first + source + j < k ? from[source + j] : 0.0f;
            }
        }
    }
}

inline const float* fp8_scales(const Matrix& w, int64_t row) {
    return reinterpret_cast<const float*>(w.scales) + row / kFp8Block * fp8_blocks(w.k);
}

inline float load_scale(const float* scale) {
    float value;
    __builtin_memcpy(&value, scale, sizeof value);
    return value;
}

template <int kTokens, bool kOneStream>
inline void fp8_few_tokens_as(const Matrix& w, int64_t begin, int64_t end, const float* packed, float* y,
                              int64_t y_stride) {
    const int64_t stride = fp8_blocks(w.k) * kFp8Block;
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* codes = w.data + row * w.k;
        const float* scales = fp8_scales(w, row);
        const float* x = packed;
        Vec::Int seen = Vec::zero();
        Vec::Float sums[kTokens];
        for (int token = 0; token < kTokens; ++token) sums[token] = Vec::broadcast(0);
        for (int64_t first = 0; first < w.k; first += kFp8Block, x += kFp8Block) {
            Vec::Float parts[kTokens];
#pragma GCC unroll 4
            for (int line = 0; line < kBlockLines; ++line) {
                const int64_t at = first + line * kBytes;
                if (line > 0 && at >= w.k) break;
                prefetch_codes<kTokens, kOneStream>(codes + at);
                const Vec::Int some = Vec::load_some(codes + at, w.k - at);
                seen = Vec::e4m3_seen(seen, some);
                Vec::Float values[4];
                Vec::e4m3(some, values);
                for (int token = 0; token < kTokens; ++token) {
                    const float* with = x + token * stride + line * kBytes;
                    parts[token] = line == 0 ? Vec::mul(values[0], Vec::load(with))
                                             : Vec::fma(values[0], Vec::load(with), parts[token]);
                    for (int v = 1; v < 4; ++v)
                        parts[token] = Vec::fma(values[v], Vec::load(with + v * kLanes), parts[token]);
                }
            }
            const Vec::Float scale = Vec::broadcast(load_scale(scales + first / kFp8Block));
            for (int token = 0; token < kTokens; ++token) sums[token] = Vec::fma(parts[token], scale, sums[token]);
        }
        const float factor = Vec::e4m3_saw_nan(seen) ? __builtin_nanf("") : kE4m3Factor;
        for (int token = 0; token < kTokens; ++token)
            y[token * y_stride + row - begin] = Vec::sum(sums[token]) * factor;
    }
}

template <int kTokens>
void fp8_few_tokens(const Matrix& w, int64_t begin, int64_t end, const float* packed, float* y, int64_t y_stride) {
    if (reads_one_stream())
        fp8_few_tokens_as<kTokens, true>(w, begin, end, packed, y, y_stride);
    else
        fp8_few_tokens_as<kTokens, false>(w, begin, end, packed, y, y_stride);
}

void fp8_few_rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                  int64_t y_stride) {
    for (int64_t token = 0; token < tokens; token += kFewTokens) {
        const float* x = reinterpret_cast<const float*>(packed) + token * fp8_blocks(w.k) * kFp8Block;
        float* to = y + token * y_stride;
        switch (tokens - token) {
            case 1:
                fp8_few_tokens<1>(w, begin, end, x, to, y_stride);
                break;
            case 2:
                fp8_few_tokens<2>(w, begin, end, x, to, y_stride);
                break;
            case 3:
                fp8_few_tokens<3>(w, begin, end, x, to, y_stride);
                break;
            default:
                fp8_few_tokens<4>(w, begin, end, x, to, y_stride);
        }
    }
}

constexpr int kFp8Rows = 8;  // that are decoded at a time

struct Fp8Span {
    alignas(64) float values[kFp8Rows][kFp8Block];
    alignas(64) float sums[kTokenBlock][kFp8Rows][kLanes];
    float scales[kFp8Rows];
};

// span.sums += the product of a block of k, for some rows and tokens.
template <int kRows, int kTokens>
inline void fp8_tile(Fp8Span& span, int row, int token, const float* x) {
    Vec::Float parts[kRows][kTokens];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) parts[i][j] = Vec::broadcast(0);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
        Vec::Float values[kRows];
        for (int i = 0; i < kRows; ++i) values[i] = Vec::load(span.values[row + i] + v * kLanes);
        for (int j = 0; j < kTokens; ++j) {
            const Vec::Float with = Vec::load(x + (token + j) * kFp8Block + v * kLanes);
            for (int i = 0; i < kRows; ++i) parts[i][j] = Vec::fma(values[i], with, parts[i][j]);
        }
    }
    for (int i = 0; i < kRows; ++i) {
        const Vec::Float scale = Vec::broadcast(span.scales[row + i]);
        for (int j = 0; j < kTokens; ++j) {
            float* sum = span.sums[token + j][row + i];
            Vec::store(sum, Vec::fma(parts[i][j], scale, Vec::load(sum)));
        }
    }
}

inline void fp8_tiles(Fp8Span& span, int rows, int tokens, const float* x) {
    for (int row = 0; row < rows; row += Vec::kFp8TileRows) {
        int token = 0;
        for (; token + Vec::kFp8TileTokens <= tokens; token += Vec::kFp8TileTokens)
            fp8_tile<Vec::kFp8TileRows, Vec::kFp8TileTokens>(span, row, token, x);
        for (; token < tokens; ++token) fp8_tile<Vec::kFp8TileRows, 1>(span, row, token, x);
    }
}

// The rows after these are asked for from one end to the other for one stream, else these ones' next blocks of k.
template <bool kOneStream>
void fp8_many_rows_block(const Matrix& w, int64_t begin, int count, const float* x, int tokens, float* y,
                         int64_t y_stride) {
    Fp8Span span;
    __builtin_memset(span.sums, 0, sizeof span.sums);
    __builtin_memset(span.values, 0, sizeof span.values);
    Vec::Int seen[kFp8Rows];
    for (int row = 0; row < kFp8Rows; ++row) {
        seen[row] = Vec::zero();
        span.scales[row] = 0;
    }
    for (int64_t first = 0; first < w.k; first += kFp8Block, x += kBlockFloats) {
        for (int row = 0; row < count; ++row) {
            const uint8_t* codes = w.data + (begin + row) * w.k + first;
            const uint8_t* ahead = kOneStream ? w.data + (begin + kFp8Rows) * w.k + first * kFp8Rows + row * kFp8Block
                                              : codes + 2 * kFp8Block;
            span.scales[row] = load_scale(fp8_scales(w, begin + row) + first / kFp8Block);
            for (int line = 0; line < kBlockLines; ++line) {
                const int64_t left = w.k - first - line * kBytes;
                const Vec::Int some = left > 0 ? Vec::load_some(codes + line * kBytes, left) : Vec::zero();
                if (kOneStream)
                    __builtin_prefetch(ahead + line * kBytes, 0, 2);
                else
                    prefetch(ahead + line * kBytes);
                seen[row] = Vec::e4m3_seen(seen[row], some);
                Vec::Float values[4];
                Vec::e4m3(some, values);
                for (int v = 0; v < 4; ++v) Vec::store(span.values[row] + line * kBytes + v * kLanes, values[v]);
            }
        }
        fp8_tiles(span, count, tokens, x);
    }
    for (int row = 0; row < count; ++row) {
        const float factor = Vec::e4m3_saw_nan(seen[row]) ? __builtin_nanf("") : kE4m3Factor;
        for (int token = 0; token < tokens; ++token)
            y[token * y_stride + row] = Vec::sum(Vec::load(span.sums[token][row])) * factor;
    }
}

template <bool kOneStream>
void fp8_many_rows_as(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                      int64_t y_stride) {
    for (int64_t token = 0; token < tokens; token += kTokenBlock) {
        const float* x = reinterpret_cast<const float*>(packed + token / kTokenBlock * fp8_block_bytes(w.k));
        const int some = static_cast<int>(tokens - token < kTokenBlock ? tokens - token : kTokenBlock);
        for (int64_t row = begin; row < end; row += kFp8Rows) {
            const int count = static_cast<int>(end - row < kFp8Rows ? end - row : kFp8Rows);
            fp8_many_rows_block<kOneStream>(w, row, count, x, some, y + token * y_stride + row - begin, y_stride);
        }
    }
}

void fp8_many_rows(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
                   int64_t y_stride) {
    if (reads_one_stream())
        fp8_many_rows_as<true>(w, begin, end, packed, tokens, y, y_stride);
    else
        fp8_many_rows_as<false>(w, begin, end, packed, tokens, y, y_stride);
}
