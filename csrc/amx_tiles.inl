// Tile products: y = a x^T for a [rows, k] in bf16, row-major, and x packed by `pack_pairs`. To be included within a
// region for amx-tile, amx-bf16 and avx512, and an anonymous namespace.
//
// The weight's rows are the left operand, whose tiles are plain row-major pieces of it: no weight is ever repacked. A
// tile is 16 rows of 32 numbers, and a packed block of x holds, for every 32 numbers of k, one tile of 16 pairs of
// numbers by 16 tokens.

#include "transpose16.inl"

constexpr int kTile = 16;
constexpr int64_t kDepth = 32;  // numbers of k that a tile product sums
constexpr int64_t kTileBytes = 1024;

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0-3 take sums, 4-5 rows of the weight, 6-7 x.
inline void configure(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.column_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTile);
    }
    _tile_loadconfig(&config);
}

inline int64_t depth_tiles(int64_t k) {
    return (k + kDepth - 1) / kDepth;
}

int64_t block_bytes_pairs(int64_t k) {
    return depth_tiles(k) * kTileBytes;
}

void pack_pairs(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int64_t tile = 0; tile < depth_tiles(k); ++tile) {
        __m512i pairs[16];
        for (int token = 0; token < kTile; ++token) {
            if (token >= tokens) {
                pairs[token] = _mm512_setzero_si512();
                continue;
            }
            const float* from = x + token * k + tile * kDepth;
            const int64_t left = k - tile * kDepth;
            const __mmask16 low = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
            const __mmask16 high =
                left >= 32 ? 0xffff : static_cast<__mmask16>(left > 16 ? (1u << (left - 16)) - 1 : 0);
            pairs[token] = reinterpret_cast<__m512i>(
                _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + 16), _mm512_maskz_loadu_ps(low, from)));
        }
        transpose16(pairs);
        for (int pair = 0; pair < kTile; ++pair)
            _mm512_storeu_si512(block + tile * kTileBytes + pair * 64, pairs[pair]);
    }
}

// The sums of one tile [16 rows, 16 tokens] to y[token, row].
inline void store_tile(const float* sums, int rows, int tokens, float* y, int64_t y_stride) {
    __m512i r[16];
    for (int row = 0; row < kTile; ++row) r[row] = _mm512_loadu_si512(sums + row * kTile);
    transpose16(r);
    const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
    for (int token = 0; token < tokens; ++token) _mm512_mask_storeu_epi32(y + token * y_stride, there, r[token]);
}

// The last, short piece of `rows` rows, filled up with zeros.
inline void copy_tail(const uint8_t* a, int64_t a_bytes, int rows, int64_t numbers, uint8_t* tile) {
    const __mmask32 there = (1u << numbers) - 1;
    for (int row = 0; row < rows; ++row)
        _mm512_storeu_si512(tile + row * 64, _mm512_maskz_loadu_epi16(there, a + row * a_bytes));
}

// The next line of each row of two tiles.
inline void prefetch_rows(const uint8_t* a, int64_t a_bytes) {
    for (int row = 0; row < 2 * kTile; ++row)
        _mm_prefetch(reinterpret_cast<const char*>(a + row * a_bytes), _MM_HINT_T0);
}

constexpr int64_t kAhead = 512;  // bytes of a row

// One tile of up to 16 rows and one of tokens; needs `configure(rows)`.
inline void product_1x1(const uint8_t* a, int64_t a_bytes, int rows, const uint8_t* x, int64_t k, float* sums) {
    alignas(64) uint8_t tail[kTileBytes];
    _tile_zero(0);
    for (int64_t tile = 0; tile < depth_tiles(k); ++tile) {
        const int64_t left = k - tile * kDepth;
        if (left >= kDepth) {
            _tile_loadd(4, a + tile * 64, static_cast<int>(a_bytes));
        } else {
            copy_tail(a + tile * 64, a_bytes, rows, left, tail);
            _tile_loadd(4, tail, 64);
        }
        _tile_loadd(6, x + tile * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
}

// Two tiles of rows and one or two of tokens: sums[row tile][token tile], each of kTile x kTile.
template <int kTokenTiles>
inline void product_2(const uint8_t* a, int64_t a_bytes, bool more_rows, const uint8_t* x, int64_t x_bytes, int64_t k,
                      float* sums) {
    alignas(64) uint8_t tail[2 * kTileBytes];
    _tile_zero(0);
    _tile_zero(2);
    if (kTokenTiles == 2) {
        _tile_zero(1);
        _tile_zero(3);
    }
    // What lies ahead of a row's end is the next row, which is being read: there the rows of the next tiles are wanted.
    const int64_t beyond = kAhead + (more_rows ? (2 * kTile - 1) * a_bytes : 0);
    for (int64_t tile = 0; tile < depth_tiles(k); ++tile) {
        const int64_t left = k - tile * kDepth;
        const uint8_t *upper = a + tile * 64, *lower = upper + kTile * a_bytes;
        int stride = static_cast<int>(a_bytes);
        if (left < kDepth) {
            copy_tail(upper, a_bytes, 2 * kTile, left, tail);
            upper = tail;
            lower = tail + kTileBytes;
            stride = 64;
        } else {
            prefetch_rows(upper + (tile * 64 + kAhead < k * 2 ? kAhead : beyond), a_bytes);
        }
        _tile_loadd(6, x + tile * kTileBytes, 64);
        _tile_loadd(4, upper, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower, stride);
        _tile_dpbf16ps(2, 5, 6);
        if (kTokenTiles == 2) {
            _tile_loadd(7, x + x_bytes + tile * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 2 * kTile * kTile, 64);
    if (kTokenTiles == 2) {
        _tile_stored(1, sums + kTile * kTile, 64);
        _tile_stored(3, sums + 3 * kTile * kTile, 64);
    }
}

inline int at_most(int64_t value, int most) {
    return static_cast<int>(value < most ? value : most);
}

// y[token, row] for `rows` rows of a; tiles must be free to use and are released by the caller.
inline void tile_rows(const uint8_t* a, int64_t a_bytes, int64_t rows, const uint8_t* packed, int64_t tokens, int64_t k,
                      float* y, int64_t y_stride) {
    alignas(64) float sums[4 * kTile * kTile];
    const int64_t x_bytes = block_bytes_pairs(k);
    int64_t row = 0;
    if (rows >= 2 * kTile) configure(kTile);
    for (; row + 2 * kTile <= rows; row += 2 * kTile) {
        const uint8_t* from = a + row * a_bytes;
        for (int64_t token = 0; token < tokens; token += 2 * kTile) {
            const uint8_t* x = packed + token / kTile * x_bytes;
            float* to = y + token * y_stride + row;
            const int first = at_most(tokens - token, kTile), second = at_most(tokens - token - kTile, kTile);
            if (second > 0)
                product_2<2>(from, a_bytes, row + 4 * kTile <= rows, x, x_bytes, k, sums);
            else
                product_2<1>(from, a_bytes, row + 4 * kTile <= rows, x, x_bytes, k, sums);
            for (int part = 0; part < 2; ++part) {
                store_tile(sums + part * 2 * kTile * kTile, kTile, first, to + part * kTile, y_stride);
                if (second > 0)
                    store_tile(sums + (part * 2 + 1) * kTile * kTile, kTile, second,
                               to + kTile * y_stride + part * kTile, y_stride);
            }
        }
    }
    for (; row < rows; row += kTile) {
        const int height = at_most(rows - row, kTile);
        configure(height);
        for (int64_t token = 0; token < tokens; token += kTile) {
            product_1x1(a + row * a_bytes, a_bytes, height, packed + token / kTile * x_bytes, k, sums);
            store_tile(sums, height, at_most(tokens - token, kTile), y + token * y_stride + row, y_stride);
        }
    }
}
