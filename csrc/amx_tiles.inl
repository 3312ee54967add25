// Tile products: y = a x^T for a [rows, k] in bf16, row-major, and x packed by `pack_pairs`. To be included within a
// region for amx-tile, amx-bf16 and avx512, and an anonymous namespace.
//
// The weight's rows are the left operand, whose tiles are plain row-major pieces of it: no weight is ever repacked. A
// tile is 16 rows of 32 numbers, and a packed block of x holds, for every 32 numbers of k, one tile of 16 pairs of
// numbers by 16 tokens.

#include "bf16_pairs.inl"

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tile instructions read this memory, which the compiler is not told by GCC's own intrinsics.
inline void written(const void* memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

// Tiles 0-3 take sums, 4-5 rows of the weight, 6-7 x.
inline void configure(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.column_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTile);
    }
    written(&config);
    _tile_loadconfig(&config);
}

// The last, short piece of `rows` rows, filled up with zeros.
inline void copy_tail(const uint8_t* a, int64_t a_bytes, int rows, int64_t numbers, uint8_t* tile) {
    const __mmask32 there = (1u << numbers) - 1;
    for (int row = 0; row < rows; ++row)
        _mm512_storeu_si512(tile + row * 64, _mm512_maskz_loadu_epi16(there, a + row * a_bytes));
}

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
            written(tail);
            _tile_loadd(4, tail, 64);
        }
        _tile_loadd(6, x + tile * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
}

constexpr int64_t kAhead = 512;  // bytes of a row

// Lines of some rows that will be read soon, asked for while others are multiplied. They have to come to the first
// cache: prefetching to the second alone makes the processor wait.
struct Ahead {
    const uint8_t* from = nullptr;
    int64_t row_bytes = 0;
    int rows = 0;
    int64_t first = 0, leap = 0;  // byte of a row to begin with, and what is leapt over at a row's end

    void line(int64_t number) const {
        const int64_t byte = first + number * 64;
        const uint8_t* at = from + (byte < row_bytes ? byte : byte + leap);
        for (int row = 0; row < rows; ++row, at += row_bytes)
            _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
    }
};

template <int kTokenTiles>
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(2);
    if (kTokenTiles == 2) {
        _tile_zero(1);
        _tile_zero(3);
    }
}

// Adds the products of two tiles of rows and one or two of tokens over `tiles` whole depths of k.
template <int kTokenTiles>
inline void add_products(const uint8_t* a, int64_t a_bytes, const uint8_t* x, int64_t x_bytes, int64_t tiles,
                         const Ahead& ahead) {
    const int stride = static_cast<int>(a_bytes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint8_t *upper = a + tile * 64, *lower = upper + kTile * a_bytes;
        ahead.line(tile);
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
}

// To sums[row tile][token tile], each of kTile x kTile.
template <int kTokenTiles>
inline void store_sums(float* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 2 * kTile * kTile, 64);
    if (kTokenTiles == 2) {
        _tile_stored(1, sums + kTile * kTile, 64);
        _tile_stored(3, sums + 3 * kTile * kTile, 64);
    }
}

// The same over all of k, from zero on.
template <int kTokenTiles>
inline void product_2(const uint8_t* a, int64_t a_bytes, const uint8_t* x, int64_t x_bytes, int64_t k,
                      const Ahead& ahead, float* sums) {
    zero_sums<kTokenTiles>();
    const int64_t whole = k / kDepth;
    add_products<kTokenTiles>(a, a_bytes, x, x_bytes, whole, ahead);
    if (k % kDepth != 0) {
        alignas(64) uint8_t tail[2 * kTileBytes];
        copy_tail(a + whole * 64, a_bytes, 2 * kTile, k % kDepth, tail);
        written(tail);
        add_products<kTokenTiles>(tail, 64, x + whole * kTileBytes, x_bytes, 1, Ahead{});
    }
    store_sums<kTokenTiles>(sums);
}

inline int at_most(int64_t value, int most) {
    return static_cast<int>(value < most ? value : most);
}

// The sums of two tiles of rows and one or, if `second` is not negative, two of tokens to y[token, row].
inline void store_sums_of_2(const float* sums, int first, int second, float* y, int64_t y_stride) {
    for (int part = 0; part < 2; ++part) {
        store_tile(sums + part * 2 * kTile * kTile, kTile, first, y + part * kTile, y_stride);
        if (second > 0)
            store_tile(sums + (part * 2 + 1) * kTile * kTile, kTile, second, y + kTile * y_stride + part * kTile,
                       y_stride);
    }
}

// y[token, row] for two tiles of rows and the tokens from `begin` on. The next `next_rows` rows will be read then.
inline void two_tiles(const uint8_t* a, int64_t a_bytes, int next_rows, const uint8_t* packed, int64_t begin,
                      int64_t tokens, int64_t k, float* y, int64_t y_stride) {
    alignas(64) float sums[4 * kTile * kTile];
    const int64_t x_bytes = block_bytes_pairs(k), passes = (tokens - begin + 2 * kTile - 1) / (2 * kTile);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t token = begin + pass * 2 * kTile;
        const uint8_t* x = packed + token / kTile * x_bytes;
        const int first = at_most(tokens - token, kTile), second = at_most(tokens - token - kTile, kTile);
        // The only pass asks for these rows and then for the next ones; of many each asks for its share of the next
        // ones.
        Ahead ahead{a, a_bytes, 2 * kTile, kAhead, next_rows > 0 ? (2 * kTile - 1) * a_bytes : 0};
        if (passes > 1) {
            const int64_t from = next_rows * pass / passes, to = next_rows * (pass + 1) / passes;
            ahead = {a + (2 * kTile + from) * a_bytes, a_bytes, static_cast<int>(to - from)};
        }
        if (second > 0)
            product_2<2>(a, a_bytes, x, x_bytes, k, ahead, sums);
        else
            product_2<1>(a, a_bytes, x, x_bytes, k, ahead, sums);
        store_sums_of_2(sums, first, second, y + token * y_stride, y_stride);
    }
}

// The same for at most 31 rows.
inline void few_rows(const uint8_t* a, int64_t a_bytes, int64_t rows, const uint8_t* packed, int64_t tokens, int64_t k,
                     float* y, int64_t y_stride) {
    alignas(64) float sums[kTile * kTile];
    for (int64_t row = 0; row < rows; row += kTile) {
        const int height = at_most(rows - row, kTile);
        configure(height);
        for (int64_t token = 0; token < tokens; token += kTile) {
            product_1x1(a + row * a_bytes, a_bytes, height, packed + token / kTile * block_bytes_pairs(k), k, sums);
            store_tile(sums, height, at_most(tokens - token, kTile), y + token * y_stride + row, y_stride);
        }
    }
}
