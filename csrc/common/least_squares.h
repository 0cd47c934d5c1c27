// What masked_least_squares_rows_ is given, the same on every device: see fade_kernels/reference.py for what it means.
#pragma once

#include "common/tensor.h"

namespace fade {

// Whether it is of float64; raises for arguments that do not fit one another. What starts, rows and mask hold is not
// looked at.
inline bool check_least_squares(const Tensor& values, const Tensor& prices, const Tensor& singular, const Tensor& rhs,
                                const Tensor& gram, const Tensor& starts, const Tensor& rows, int64_t most) {
  const bool wide = rhs.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || rhs.scalar_type() == ScalarType::Float, "rhs must be float32 or float64");
  for (const auto& other : {gram, values, prices}) {
    STD_TORCH_CHECK(other.scalar_type() == rhs.scalar_type(), "gram, values and prices must be of rhs's dtype");
  }
  for (const auto& indices : {starts, rows, singular}) {
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "starts, rows and singular must be int64");
  }
  for (const auto& other : {values, prices, singular, starts, rows}) {
    STD_TORCH_CHECK(other.is_contiguous(), "what is written, starts and rows must be contiguous");
  }
  STD_TORCH_CHECK(rhs.dim() == 2 && gram.dim() == 2 && gram.size(0) == rhs.size(1) && gram.size(1) == rhs.size(1),
                  "rhs [N, K] and gram [K, K] must fit");
  STD_TORCH_CHECK(starts.numel() == rhs.size(0), "starts must be [", rhs.size(0), "], not [", starts.numel(), "]");
  STD_TORCH_CHECK(prices.numel() == 0 || prices.numel() == values.numel(), "prices must be [0] or as long as values");
  STD_TORCH_CHECK(most >= 1, "rows of at least one entry are solved, not of ", most);
  return wide;
}

}  // namespace fade
