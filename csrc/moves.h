// What becomes of a record's bytes once they are read: where they belong, turned round, as another type of number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pointwise.h"

namespace moert {

// What is moved: numbers, which may become others, or bytes, which stay as they are.
enum class Item : int { kFp32, kBf16, kFp16, kByte };

constexpr int kItems = 4;

constexpr size_t bytes_of(Item item) {
    return item == Item::kByte ? 1 : static_cast<size_t>(bytes_of(static_cast<Number>(item)));
}

// rows x columns items. `source` and `destination` are bytes from the beginning of either memory, the distances from
// one row or column to the next are in items. A row's items lie side by side in the destination, which is aligned to
// its items; the source need not be.
struct Move {
    Item from = Item::kByte, to = Item::kByte;
    size_t rows = 0, columns = 0;
    size_t source = 0, source_row = 0, source_column = 0;
    size_t destination = 0, destination_row = 0;
};

// Moves in their order. Their memories do not overlap, unless the same bytes are both.
struct Moves {
    std::vector<Move> moves;
    size_t source_bytes = 0, destination_bytes = 0;  // that are touched, from the beginning

    // False, and nothing is added, where a move is not one, or reaches beyond what can be counted.
    bool add(const Move& move);

    // Rounds to nearest, ties to even; what is too large becomes infinity, NaN stays NaN.
    void run(const uint8_t* source, uint8_t* destination) const;
};

}  // namespace moert
