// The layout of a packed mask, in one place: row-major words of 32 columns, bit j of word w is column 32 w + j. The bits
// of a row's last word beyond its columns are padding: 0 as fade_kernels/bitmask.py makes them, and ignored by every
// kernel whatever they are, because words also come from files and state dicts.
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

// The bits of a row's word that are columns: all of them but in the last word. 0 <= word < words_per_row(columns).
FADE_HOST_DEVICE uint32_t column_bits(int64_t word, int64_t columns) {
  const int64_t left = columns - word * kWordBits;
  return bit_range(0, left < kWordBits ? left : kWordBits);
}

// The lowest `count` set bits of a word, all of them where there are fewer.
FADE_HOST_DEVICE uint32_t lowest_bits(uint32_t word, int64_t count) {
  uint32_t rest = word;
  for (; count > 0 && rest != 0; --count) rest &= rest - 1;
  return word & ~rest;
}

// A word of a packed mask, moved on without a division.
struct WordCursor {
  int64_t width, row, word;  // words per row; row of the mask; word within it
  FADE_HOST_DEVICE WordCursor(int64_t index, int64_t words_per_row)
      : width(words_per_row), row(index / words_per_row), word(index - row * words_per_row) {}
  FADE_HOST_DEVICE void next() {
    if (++word == width) {
      word = 0;
      ++row;
    }
  }
};

}  // namespace fade
