// Storage types and their exact conversion to float: fp16 and bf16 as plain bit patterns, converted with integer and
// fp32 arithmetic that every compiler vectorises and that needs no torch header. Format: IEEE 754 binary16; bfloat16 is
// the upper half of binary32.
#pragma once

#include "common/macros.h"

namespace fade {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FADE_HOST_DEVICE float to_float(float value) { return value; }

FADE_HOST_DEVICE float to_float(double value) { return static_cast<float>(value); }

FADE_HOST_DEVICE float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

FADE_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(value.bits));
  return converted;
#else
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  const uint32_t sign = word & 0x80000000u;
  const uint32_t magnitude = word + word;  // exponent and mantissa, left-aligned
  // Normal, inf and NaN: move the exponent from bias 15 to 127 in two steps, so that 31 becomes 255 by overflow to inf.
  const float normal = bit_cast<float>((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  // Subnormal: place the mantissa under the exponent of 0.5 and subtract 0.5.
  const float subnormal = bit_cast<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t bits = bit_cast<uint32_t>(magnitude < (1u << 27) ? subnormal : normal);
  return bit_cast<float>(sign | bits);
#endif
}

FADE_HOST_DEVICE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return BFloat16{static_cast<uint16_t>(nan ? 0x7FC0u : rounded)};
}

FADE_HOST_DEVICE Half to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Scaling up saturates to inf what overflows; the addition then rounds to the 10 (or fewer) mantissa bits of binary16.
  float base = (bit_cast<float>(magnitude) * 0x1.0p+112f) * 0x1.0p-110f;
  uint32_t bias = (bits + bits) & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  base = bit_cast<float>((bias >> 1) + 0x07800000u) + base;
  const uint32_t sum = bit_cast<uint32_t>(base);
  const uint32_t nonsign = ((sum >> 13) & 0x00007C00u) + (sum & 0x00000FFFu);
  return Half{static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : nonsign))};
}

}  // namespace fade
