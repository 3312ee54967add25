#include "moves.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moert {
namespace {

constexpr size_t kTile = 32;      // rows and columns that are turned at once: a line of the cache of either
constexpr size_t kNumbers = 512;  // that are converted at once where there is something in between

// Bytes from the first item to behind the last one; false where that cannot be counted.
bool extent(size_t begin, size_t rows, size_t row, size_t columns, size_t column, size_t item, size_t* end) {
    size_t last_row, last_column, last;
    return !__builtin_mul_overflow(rows - 1, row, &last_row) &&
           !__builtin_mul_overflow(columns - 1, column, &last_column) &&
           !__builtin_add_overflow(last_row, last_column, &last) && !__builtin_add_overflow(last, size_t{1}, &last) &&
           !__builtin_mul_overflow(last, item, &last) && !__builtin_add_overflow(begin, last, end);
}

// n items side by side; `from` is aligned to its items.
void convert_aligned(const Move& move, const uint8_t* from, uint8_t* to, size_t n) {
    const auto count = static_cast<int64_t>(n);
    if (move.from == move.to) {
        std::memcpy(to, from, n * bytes_of(move.to));
    } else if (move.to == Item::kFp32) {
        pointwise().widen(static_cast<Number>(move.from), from, reinterpret_cast<float*>(to), count);
    } else if (move.from == Item::kFp32) {
        pointwise().narrow(reinterpret_cast<const float*>(from), static_cast<Number>(move.to), to, count);
    } else {
        float wide[kNumbers];
        for (size_t i = 0; i < n; i += kNumbers) {
            const auto some = static_cast<int64_t>(std::min(kNumbers, n - i));
            pointwise().widen(static_cast<Number>(move.from), from + i * bytes_of(move.from), wide, some);
            pointwise().narrow(wide, static_cast<Number>(move.to), to + i * bytes_of(move.to), some);
        }
    }
}

void convert(const Move& move, const uint8_t* from, uint8_t* to, size_t n) {
    const size_t item = bytes_of(move.from);
    if (move.from == move.to || reinterpret_cast<uintptr_t>(from) % item == 0) {
        convert_aligned(move, from, to, n);
        return;
    }
    alignas(64) uint8_t aligned[kNumbers * 4];
    for (size_t i = 0; i < n; i += kNumbers) {
        const size_t some = std::min(kNumbers, n - i);
        std::memcpy(aligned, from + i * item, some * item);
        convert_aligned(move, aligned, to + i * bytes_of(move.to), some);
    }
}

// Rows x columns items, `step` bytes from one column's row 0 to the next one's, become rows of kTile items.
template <size_t kItem>
void turn_some(const uint8_t* from, size_t row, size_t step, size_t rows, size_t columns, uint8_t* to) {
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < columns; ++c)
            std::memcpy(to + (r * kTile + c) * kItem, from + r * row + c * step, kItem);
}

#if defined(__SSE2__)
// Eight columns of eight 16-bit items, each side by side.
inline void turn_eight(const uint8_t* from, size_t step, uint8_t* to) {
    __m128i a[8], b[8];
    for (size_t i = 0; i < 8; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * step));
    for (size_t i = 0; i < 8; i += 2) {
        b[i] = _mm_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (size_t i = 0; i < 8; i += 4) {
        a[i] = _mm_unpacklo_epi32(b[i], b[i + 2]);
        a[i + 1] = _mm_unpackhi_epi32(b[i], b[i + 2]);
        a[i + 2] = _mm_unpacklo_epi32(b[i + 1], b[i + 3]);
        a[i + 3] = _mm_unpackhi_epi32(b[i + 1], b[i + 3]);
    }
    for (size_t i = 0; i < 4; ++i) {
        const __m128i low = _mm_unpacklo_epi64(a[i], a[i + 4]), high = _mm_unpackhi_epi64(a[i], a[i + 4]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i * kTile * 2), low);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i + 1) * kTile * 2), high);
    }
}

// Four columns of four 32-bit items, each side by side.
inline void turn_four(const uint8_t* from, size_t step, uint8_t* to) {
    __m128i a[4];
    for (size_t i = 0; i < 4; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * step));
    const __m128i low = _mm_unpacklo_epi32(a[0], a[1]), low2 = _mm_unpacklo_epi32(a[2], a[3]);
    const __m128i high = _mm_unpackhi_epi32(a[0], a[1]), high2 = _mm_unpackhi_epi32(a[2], a[3]);
    const __m128i rows[4] = {_mm_unpacklo_epi64(low, low2), _mm_unpackhi_epi64(low, low2),
                             _mm_unpacklo_epi64(high, high2), _mm_unpackhi_epi64(high, high2)};
    for (size_t i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * kTile * 4), rows[i]);
}
#endif

// As turn_some, of a whole tile whose columns' items lie side by side.
template <size_t kItem>
void turn_tile(const uint8_t* from, size_t step, uint8_t* to) {
#if defined(__SSE2__)
    if constexpr (kItem == 2 || kItem == 4) {
        constexpr size_t kSome = 16 / kItem;
        for (size_t r = 0; r < kTile; r += kSome) {
            for (size_t c = 0; c < kTile; c += kSome) {
                const uint8_t* begin = from + r * kItem + c * step;
                uint8_t* end = to + (r * kTile + c) * kItem;
                if constexpr (kItem == 2) {
                    turn_eight(begin, step, end);
                } else {
                    turn_four(begin, step, end);
                }
            }
        }
        return;
    }
#endif
    turn_some<kItem>(from, kItem, step, kTile, kTile, to);
}

template <size_t kItem>
void move_turned(const Move& move, const uint8_t* source, uint8_t* destination) {
    alignas(64) uint8_t tile[kTile * kTile * kItem];
    const size_t row = move.source_row * kItem, step = move.source_column * kItem, to_item = bytes_of(move.to);
    for (size_t r = 0; r < move.rows; r += kTile) {
        const size_t rows = std::min(kTile, move.rows - r);
        for (size_t c = 0; c < move.columns; c += kTile) {
            const size_t columns = std::min(kTile, move.columns - c);
            const uint8_t* from = source + r * row + c * step;
            if (rows == kTile && columns == kTile && move.source_row == 1) {
                turn_tile<kItem>(from, step, tile);
            } else {
                turn_some<kItem>(from, row, step, rows, columns, tile);
            }
            uint8_t* to = destination + (r * move.destination_row + c) * to_item;
            for (size_t i = 0; i < rows; ++i)
                convert_aligned(move, tile + i * kTile * kItem, to + i * move.destination_row * to_item, columns);
        }
    }
}

void run_one(const Move& move, const uint8_t* source, uint8_t* destination) {
    source += move.source;
    destination += move.destination;
    if (move.source_column == 1) {
        const size_t from_row = move.source_row * bytes_of(move.from);
        const size_t to_row = move.destination_row * bytes_of(move.to);
        for (size_t r = 0; r < move.rows; ++r)
            convert(move, source + r * from_row, destination + r * to_row, move.columns);
    } else if (bytes_of(move.from) == 4) {
        move_turned<4>(move, source, destination);
    } else if (bytes_of(move.from) == 2) {
        move_turned<2>(move, source, destination);
    } else {
        move_turned<1>(move, source, destination);
    }
}

}  // namespace

bool Moves::add(const Move& move) {
    if (move.rows == 0 || move.columns == 0) return false;
    if (move.from != move.to && (move.from == Item::kByte || move.to == Item::kByte)) return false;
    if (move.destination % bytes_of(move.to) != 0) return false;
    size_t source_end, destination_end;
    if (!extent(move.source, move.rows, move.source_row, move.columns, move.source_column, bytes_of(move.from),
                &source_end) ||
        !extent(move.destination, move.rows, move.destination_row, move.columns, 1, bytes_of(move.to),
                &destination_end)) {
        return false;
    }
    source_bytes = std::max(source_bytes, source_end);
    destination_bytes = std::max(destination_bytes, destination_end);
    moves.push_back(move);
    return true;
}

void Moves::run(const uint8_t* source, uint8_t* destination) const {
    for (const Move& move : moves) run_one(move, source, destination);
}

}  // namespace moert
