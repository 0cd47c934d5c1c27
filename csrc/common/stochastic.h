// Stochastic rounding from fp32 to 16 bits: up or down with probabilities that make the mean the value itself. Pure
// arithmetic on bits, so that every device draws the same. Definition: reference.round_stochastically; why it is right:
// fade_kernels/triton_kernels/effective_weight.py.
#pragma once

#include "common/dtype.h"

namespace fade {

// A bijection in which every input bit changes every output bit about half the time.
FADE_HOST_DEVICE uint32_t hash_bits(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
  bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
  return bits ^ (bits >> 16);
}

// What seeds the random bits of a layer, by its place in a call; those of its element n K + k are
// hash_bits(hash_bits(element) + key).
FADE_HOST_DEVICE uint32_t rounding_key(int64_t layer, int64_t seed) {
  return hash_bits(hash_bits(static_cast<uint32_t>(layer)) + (static_cast<uint32_t>(seed) & 0x7FFFFFFFu));
}

// The value as one of its two neighbours among fp16 (kHalf) or bf16 numbers, by 32 random bits. What is representable
// stays, infinities and NaN too. Selections, not branches: the loop around must become vectors.
template <bool kHalf>
FADE_HOST_DEVICE float round_stochastically(float value, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value), exponent = (bits >> 23) & 0xFFu;
  uint32_t low = 0xFFFFu;  // bits of fp32 that the narrow format lacks at this magnitude
  if (kHalf) {
    const uint32_t below_normal = exponent < 113u ? 113u - exponent : 0u;
    low = (1u << (13u + (below_normal < 10u ? below_normal : 10u))) - 1u;
  }
  uint32_t rounded = (bits + (random & low)) & ~low;
  if (kHalf) {  // below 2^-24, the smallest number: that or zero
    const float size = bit_cast<float>(bits & 0x7FFFFFFFu);
    const uint32_t least = static_cast<float>(static_cast<int32_t>(random >> 8)) < size * 0x1.0p+48f ? 0x33800000u : 0u;
    rounded = exponent < 103u ? least | (bits & 0x80000000u) : rounded;
  }
  return bit_cast<float>(exponent == 255u ? bits : rounded);
}

}  // namespace fade
