// Products of unquantised weights with a few rows of x, for one instruction set. To be included within its target
// region and an anonymous namespace, after a `struct Vec` with:
//
//   Reg, kLanes (a divisor of 16), kMostTokens (at most 6)       zero()
//   load(p) fma(a, b, c) broadcast(f) sum(reg) store(p, reg) weights<kFormat>(p), weights_tail<kFormat>(p, n) kLanes
//   numbers of a row; only n of them are there, the rest are 0 prefetch(p)
//
// A token's packed row is its fp32 numbers and zeros up to a multiple of 16.

constexpr int kRowBlock = 4;  // rows of the weight that share each load of x

constexpr int fewer(int a, int b) {
    return a < b ? a : b;
}

constexpr int64_t kPrefetchBytes = 1024;

inline int64_t padded(int64_t k) {
    return (k + 15) / 16 * 16;
}

int64_t block_bytes_fp32(int64_t k) {
    return padded(k) * kTokenBlock * static_cast<int64_t>(sizeof(float));
}

void pack_fp32(const float* x, int tokens, int64_t k, uint8_t* block) {
    float* to = reinterpret_cast<float*>(block);
    for (int token = 0; token < tokens; ++token, to += padded(k), x += k) {
        __builtin_memcpy(to, x, static_cast<size_t>(k) * sizeof(float));
        for (int64_t i = k; i < padded(k); ++i) to[i] = 0;
    }
}

template <Format kFormat>
constexpr int64_t bytes_of() {
    return kFormat == Format::kFp32 ? 4 : 2;
}

// Numbers of k that are summed for all rows of a tile before the next ones: that much of some tokens' x stays in the
// first cache while a tile of the weight passes by.
constexpr int64_t kChunk = 512;
constexpr int64_t kFirstCacheBytes = 36 << 10;  // of x, up to which it stays there anyway
constexpr int64_t kTileRows = 32;

// Sums over [begin, end) of k, a multiple of the lanes but for the end of a row, go on from `partial` or from zero, and
// end there or, at the end of the row, in y.
template <Format kFormat, int kRows, int kTokens, bool kPrefetch>
inline void rows_block(const uint8_t* weight, int64_t row_bytes, const float* x, int64_t x_stride, int64_t begin,
                       int64_t end, int64_t k, float* partial, float* y, int64_t y_stride, bool more_rows) {
    typename Vec::Reg sums[kRows][kTokens];
    for (int row = 0; row < kRows; ++row)
        for (int token = 0; token < kTokens; ++token)
            sums[row][token] = begin == 0 ? Vec::zero() : Vec::load(partial + (row * kTokens + token) * Vec::kLanes);
    const int64_t whole = end / Vec::kLanes * Vec::kLanes;
    // What lies ahead of a row's end is the next row, which is being read: there the rows of the next block are wanted.
    const int64_t last = k - kPrefetchBytes / bytes_of<kFormat>();
    const int64_t beyond = kPrefetchBytes + (more_rows ? (kRows - 1) * row_bytes : 0);
    for (int64_t i = begin; i < whole; i += Vec::kLanes) {
        const int64_t ahead = i < last ? kPrefetchBytes : beyond;
        typename Vec::Reg values[kTokens];
        for (int token = 0; token < kTokens; ++token) values[token] = Vec::load(x + token * x_stride + i);
        for (int row = 0; row < kRows; ++row) {
            const uint8_t* numbers = weight + row * row_bytes + i * bytes_of<kFormat>();
            if (kPrefetch) Vec::prefetch(numbers + ahead);
            const typename Vec::Reg w = Vec::template weights<kFormat>(numbers);
            for (int token = 0; token < kTokens; ++token)
                sums[row][token] = Vec::fma(w, values[token], sums[row][token]);
        }
    }
    if (whole < end) {
        for (int row = 0; row < kRows; ++row) {
            const uint8_t* numbers = weight + row * row_bytes + whole * bytes_of<kFormat>();
            const typename Vec::Reg w = Vec::template weights_tail<kFormat>(numbers, static_cast<int>(end - whole));
            for (int token = 0; token < kTokens; ++token)
                sums[row][token] = Vec::fma(w, Vec::load(x + token * x_stride + whole), sums[row][token]);
        }
    }
    if (end < k) {
        for (int row = 0; row < kRows; ++row)
            for (int token = 0; token < kTokens; ++token)
                Vec::store(partial + (row * kTokens + token) * Vec::kLanes, sums[row][token]);
    } else {
        for (int row = 0; row < kRows; ++row)
            for (int token = 0; token < kTokens; ++token) y[token * y_stride + row] = Vec::sum(sums[row][token]);
    }
}

// Rows [begin, end), at most kTileRows of them; those up to `limit` will be wanted next.
template <Format kFormat, int kTokens>
inline void rows_of_tokens(const Matrix& w, int64_t begin, int64_t end, int64_t limit, const float* x, int64_t x_stride,
                           int64_t chunk, float* y, int64_t y_stride) {
    const int64_t row_bytes = w.k * bytes_of<kFormat>();
    // More tokens take so long for each line that memory is not what is waited for.
    const bool one_stream = kTokens == 1 && reads_one_stream();
    alignas(64) float partial[kTileRows * kTokens * Vec::kLanes];
    for (int64_t from = 0; from < w.k; from += chunk) {
        const int64_t to = from + chunk < w.k ? from + chunk : w.k;
        float* sums = partial;
        int64_t row = begin;
        for (; !one_stream && row + kRowBlock <= end; row += kRowBlock, sums += kRowBlock * kTokens * Vec::kLanes)
            rows_block<kFormat, kRowBlock, kTokens, true>(w.data + row * row_bytes, row_bytes, x, x_stride, from, to,
                                                          w.k, sums, y + row - begin, y_stride,
                                                          row + 2 * kRowBlock <= limit);
        for (; row < end; ++row, sums += kTokens * Vec::kLanes)
            rows_block<kFormat, 1, kTokens, false>(w.data + row * row_bytes, row_bytes, x, x_stride, from, to, w.k,
                                                   sums, y + row - begin, y_stride, false);
    }
}

// Rows of a transposed weight [k, n], kVectors whole vectors of them or `count` in one: the rows in lanes, a number of
// x for all of them.
template <Format kFormat, int kVectors, bool kWhole, int kTokens>
inline void columns_block(const Matrix& w, int64_t begin, int64_t count, const float* x, int64_t x_stride, float* y,
                          int64_t y_stride) {
    typename Vec::Reg sums[kVectors][kTokens];
    for (int v = 0; v < kVectors; ++v)
        for (int token = 0; token < kTokens; ++token) sums[v][token] = Vec::zero();
    const int64_t step = w.n * bytes_of<kFormat>();
    const uint8_t* numbers = w.data + begin * bytes_of<kFormat>();
    const int64_t ahead = step < 2048 ? (2048 / step + 1) * step : 4 * step;
    for (int64_t i = 0; i < w.k; ++i, numbers += step) {
        typename Vec::Reg values[kTokens];
        for (int token = 0; token < kTokens; ++token) values[token] = Vec::broadcast(x[token * x_stride + i]);
        for (int v = 0; v < kVectors; ++v) {
            const uint8_t* at = numbers + v * Vec::kLanes * bytes_of<kFormat>();
            Vec::prefetch(at + ahead);
            const typename Vec::Reg weights = kWhole ? Vec::template weights<kFormat>(at)
                                                     : Vec::template weights_tail<kFormat>(at, static_cast<int>(count));
            for (int token = 0; token < kTokens; ++token)
                sums[v][token] = Vec::fma(weights, values[token], sums[v][token]);
        }
    }
    for (int token = 0; token < kTokens; ++token) {
        for (int v = 0; v < kVectors; ++v) {
            float* to = y + token * y_stride + v * Vec::kLanes;
            if (kWhole) {
                Vec::store(to, sums[v][token]);
            } else {
                float lanes[Vec::kLanes];
                Vec::store(lanes, sums[v][token]);
                for (int64_t lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
            }
        }
    }
}

template <Format kFormat, int kTokens>
inline void columns_of_tokens(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t x_stride, float* y,
                              int64_t y_stride) {
    constexpr int64_t kBlock = 4 * Vec::kLanes;
    int64_t column = begin;
    for (; column + kBlock <= end; column += kBlock)
        columns_block<kFormat, 4, true, kTokens>(w, column, kBlock, x, x_stride, y + column - begin, y_stride);
    for (; column + Vec::kLanes <= end; column += Vec::kLanes)
        columns_block<kFormat, 1, true, kTokens>(w, column, Vec::kLanes, x, x_stride, y + column - begin, y_stride);
    if (column < end)
        columns_block<kFormat, 1, false, kTokens>(w, column, end - column, x, x_stride, y + column - begin, y_stride);
}

template <Format kFormat, bool kTransposed, int kTokens>
inline void some_tokens(const Matrix& w, int64_t begin, int64_t end, int64_t limit, const float* x, int64_t x_stride,
                        int64_t chunk, float* y, int64_t y_stride) {
    if (kTransposed) return columns_of_tokens<kFormat, kTokens>(w, begin, end, x, x_stride, y, y_stride);
    rows_of_tokens<kFormat, kTokens>(w, begin, end, limit, x, x_stride, chunk, y, y_stride);
}

template <Format kFormat, bool kTransposed>
void rows_fp32(const Matrix& w, int64_t begin, int64_t end, const uint8_t* packed, int64_t tokens, float* y,
               int64_t y_stride) {
    constexpr int kMost = fewer(Vec::kMostTokens, kTransposed ? 4 : 6);
    const int64_t stride = padded(w.k);
    const float* x = reinterpret_cast<const float*>(packed);  // blocks are full but for the last: rows at one stride
    const int64_t most_passes = (tokens + kMost - 1) / kMost;
    const int64_t x_bytes = (tokens + most_passes - 1) / most_passes * stride * static_cast<int64_t>(sizeof(float));
    const int64_t chunk = most_passes > 1 && x_bytes > kFirstCacheBytes ? kChunk : w.k;
    for (int64_t row = begin; row < end; row += kTileRows) {
        const int64_t row_end = row + kTileRows < end ? row + kTileRows : end;
        int64_t passes = most_passes;
        for (int64_t token = 0, count; token < tokens; token += count, --passes) {
            count = (tokens - token + passes - 1) / passes;
            const float* from = x + token * stride;
            float* to = y + token * y_stride + row - begin;
            switch (count) {
                case 1:
                    some_tokens<kFormat, kTransposed, 1>(w, row, row_end, end, from, stride, chunk, to, y_stride);
                    break;
                case 2:
                    some_tokens<kFormat, kTransposed, fewer(kMost, 2)>(w, row, row_end, end, from, stride, chunk, to,
                                                                       y_stride);
                    break;
                case 3:
                    some_tokens<kFormat, kTransposed, fewer(kMost, 3)>(w, row, row_end, end, from, stride, chunk, to,
                                                                       y_stride);
                    break;
                case 4:
                    some_tokens<kFormat, kTransposed, fewer(kMost, 4)>(w, row, row_end, end, from, stride, chunk, to,
                                                                       y_stride);
                    break;
                case 5:
                    some_tokens<kFormat, kTransposed, fewer(kMost, 5)>(w, row, row_end, end, from, stride, chunk, to,
                                                                       y_stride);
                    break;
                default:
                    some_tokens<kFormat, kTransposed, kMost>(w, row, row_end, end, from, stride, chunk, to, y_stride);
            }
        }
    }
}

template <Format kFormat, bool kTransposed>
constexpr Kernel float_kernel(const char* name) {
    return Kernel{name, block_bytes_fp32, pack_fp32, rows_fp32<kFormat, kTransposed>};
}

const Kernel* select_float(const Matrix& w, const Kernel (&kernels)[6]) {
    switch (w.format) {
        case Format::kFp32:
            return &kernels[w.transposed ? 1 : 0];
        case Format::kBf16:
            return &kernels[w.transposed ? 3 : 2];
        case Format::kFp16:
            return &kernels[w.transposed ? 5 : 4];
        default:
            return nullptr;
    }
}

#define MOERT_FLOAT_KERNELS(isa)                                                                                     \
    const Kernel kKernels[6] = {                                                                                     \
        float_kernel<Format::kFp32, false>(isa " fp32"), float_kernel<Format::kFp32, true>(isa " fp32, transposed"), \
        float_kernel<Format::kBf16, false>(isa " bf16"), float_kernel<Format::kBf16, true>(isa " bf16, transposed"), \
        float_kernel<Format::kFp16, false>(isa " fp16"), float_kernel<Format::kFp16, true>(isa " fp16, transposed"), \
    }
