// Radix selection of the k-th largest of non-negative floats, without sorting: their bit patterns order like the
// values, so a histogram of the upper bits finds the bin of the k-th largest, and one of the lower bits its exact value.
//
// CPU: two digits of 16 bits, one pass less over memory than with smaller ones, and few of the 2^16 bins are ever hot.
// CUDA: three digits of 11, 10 and 10 bits, whose histograms fit into shared memory several times over; the sign bit
// needs no digit, because a key has none.
#pragma once

#include "common/macros.h"

namespace fade {

constexpr int kDigitBits = 16;
constexpr uint32_t kDigits = 1u << kDigitBits;
constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint32_t kSignBit = 0x80000000u;

// Sorts like the value for every float that is_selectable; -0 is 0.
FADE_HOST_DEVICE uint32_t selection_key(uint32_t bits) { return bits & ~kSignBit; }

FADE_HOST_DEVICE uint32_t high_digit(uint32_t key) { return key >> kDigitBits; }

FADE_HOST_DEVICE uint32_t low_digit(uint32_t key) { return key & (kDigits - 1); }

// Neither NaN nor negative: [+0, +inf] and -0.
FADE_HOST_DEVICE bool is_selectable(uint32_t bits) { return bits <= kInfinityBits || bits == kSignBit; }

// High digits whose bin may hold a float that is not selectable: inf (shared with NaN), NaN, and everything negative.
FADE_HOST_DEVICE bool is_suspicious(uint32_t digit) { return digit >= high_digit(kInfinityBits); }

// A digit of a 31-bit key for the passes on CUDA: `bits` bits from bit `shift` up.
struct Digit {
  int shift, bits;
  FADE_HOST_DEVICE uint32_t of(uint32_t key) const { return (key >> shift) & ((1u << bits) - 1u); }
  // Whether a key agrees with `prefix` in all bits above this digit.
  FADE_HOST_DEVICE bool follows(uint32_t key, uint32_t prefix) const { return ((key ^ prefix) >> (shift + bits)) == 0; }
};

constexpr int kPasses = 3;
constexpr int kMaxBins = 1 << 11;
constexpr Digit kPassDigits[kPasses] = {{20, 11}, {10, 10}, {0, 10}};

}  // namespace fade
