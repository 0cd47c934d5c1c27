// Stochastic rounding of fp32 to bf16 or fp16: up or down, so that the mean over the random bits is the value itself.
// The same bits as triton_kernels/effective_weight.py, which says how, and the definition in reference.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/macros.h"

namespace fade {

// A bijection in which every input bit changes every output bit about half the time.
inline uint32_t hash_bits(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
  bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
  return bits ^ (bits >> 16);
}

// What seeds the bits of a layer, the `layer`-th of its call; an element's: hash_bits(hash_bits(element) + key).
inline uint32_t rounding_key(uint32_t layer, int64_t seed) {
  return hash_bits(hash_bits(layer) + static_cast<uint32_t>(seed % (int64_t{1} << 31)));
}

// fp32 that fp16 (or bf16) represents.
template <bool fp16>
float round_stochastically(float value, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const int32_t exponent = (bits >> 23) & 0xFF;
  if (exponent == 255) return value;
  uint32_t low = 0xFFFFu;
  if (fp16) {
    if (exponent < 103) {  // below 2^-24, fp16's smallest number
      const bool up = static_cast<float>(random >> 8) < std::fabs(value) * 0x1.0p48f;
      return bit_cast<float>((up ? 0x33800000u : 0u) | (bits & 0x80000000u));
    }
    low = (1u << (13 + std::clamp(113 - exponent, 0, 10))) - 1;
  }
  return bit_cast<float>((bits + (random & low)) & ~low);
}

}  // namespace fade
