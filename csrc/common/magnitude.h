// The arithmetic of a saliency accumulator: what one gradient adds to it. FADE takes the absolute value, SalUn the
// gradient itself (magnitude taken once at the end), Fisher-based methods (SSD) the square.
#pragma once

#include "common/macros.h"

namespace fade {

enum class Magnitude { kAbs, kSigned, kSquare };

template <Magnitude mode>
FADE_HOST_DEVICE float contribution(float gradient) {
  if constexpr (mode == Magnitude::kAbs) {
    return gradient < 0.0f ? -gradient : gradient;
  } else if constexpr (mode == Magnitude::kSquare) {
    return gradient * gradient;
  } else {
    return gradient;
  }
}

}  // namespace fade
