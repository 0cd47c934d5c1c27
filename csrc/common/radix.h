// Radix selection of the k-th largest of non-negative floats, without sorting: their bit patterns order like the values,
// so a histogram of the upper 16 bits finds the bin of the k-th largest, and one of the lower 16 bits its exact value. Two
// digits of 16 bits rather than three of 11, 11 and 10: one pass less over memory, and few of the 2^16 bins are ever hot.
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

}  // namespace fade
