// The tiles of 128 rows by 4 columns in which cuBLAS reads block scales ("1D block scaling factors layout").
#pragma once

#include <cstdint>

#include "minifloat.h"

namespace lrq {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 4;
constexpr int kTile = kTileRows * kTileColumns;
// Rows so far apart are neighbours in memory: 4 rows of 4 columns take 16 bytes.
constexpr int kTileStep = 32;
constexpr int kTileSteps = kTileRows / kTileStep;
constexpr int kTileVector = kTileSteps * kTileColumns;

// Byte of scale [row, column] in its matrix.
LRQ_INLINE int64_t swizzled(int64_t column_tiles, int64_t row, int64_t column) {
    const int64_t tile = row / kTileRows * column_tiles + column / kTileColumns;
    return tile * kTile + row % kTileStep * kTileVector + row % kTileRows / kTileStep * kTileColumns +
           column % kTileColumns;
}

}  // namespace lrq
