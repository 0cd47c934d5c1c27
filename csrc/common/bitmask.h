// The layout of a packed mask, in one place: row-major words of 32 columns, bit j of word w is column 32 w + j, padding
// bits at the end of a row are 0. The Python side of the same definition is fade_kernels/bitmask.py.
#pragma once

#include "common/macros.h"

namespace fade {

constexpr int64_t kWordBits = 32;

FADE_HOST_DEVICE int64_t words_per_row(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

FADE_HOST_DEVICE bool mask_bit(const uint32_t* row, int64_t column) {
  return (row[column / kWordBits] >> (column % kWordBits)) & 1u;
}

// Bits [begin, end) of a word, 0 <= begin < end <= 32.
FADE_HOST_DEVICE uint32_t bit_range(int64_t begin, int64_t end) {
  const uint32_t below_end = end == kWordBits ? ~0u : (1u << end) - 1u;
  return below_end & (~0u << begin);
}

}  // namespace fade
