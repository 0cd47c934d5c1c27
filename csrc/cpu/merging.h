// Weight and delta as one matrix: added in the compute type and rounded once, to nearest or, for training with one
// product in 16 bits, stochastically.
#pragma once

#include <optional>

#include "common/stochastic.h"
#include "cpu/mask.h"
#include "cpu/rows.h"

namespace fade {

// out = weight + delta in the compute type, rounded once to out's dtype. out may be the weight itself.
template <typename T>
void store_effective_weight(const Tensor& out, const Optional& weight, const Delta<T>& delta) {
  check_matrix(out, delta.mask, "out");
  if (weight) check_matrix(*weight, delta.mask, "weight");
  if (out.scalar_type() != dtype_of<T>() || !out.is_contiguous()) {
    Tensor target = out;
    torch::stable::copy_(target, delta.effective_weight(weight, out));
    return;
  }
  const Tensor dense = weight ? as_dense(as_type(*weight, dtype_of<T>())) : out;
  delta.add_to(weight ? read<T>(dense) : nullptr, write<T>(out));
}

using Seed = std::optional<int64_t>;

// Whether a seed asks for a rounded weight: where nothing is rounded to 16 bits it changes nothing.
inline bool rounds(const Tensor& x, const Seed& seed) {
  return seed && (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16);
}

// W + delta rounded stochastically to the dtype of x, in fp32: outside the mask the weight is representable as it is.
inline Tensor round_weight(const Tensor& x, const Optional& weight, const Delta<float>& delta, int64_t seed) {
  const Mask& mask = delta.mask;
  const Tensor sum = delta.effective_weight(as_type(weight, ScalarType::Float), x);
  const int32_t* columns = mask.positions();
  const uint32_t key = rounding_key(0, seed);
  const bool fp16 = x.scalar_type() == ScalarType::Half;
  torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* row = write<float>(sum) + n * mask.columns;
      for (int64_t i = mask.offsets[n]; i < mask.offsets[n + 1]; ++i) {
        const uint32_t random = hash_bits(hash_bits(static_cast<uint32_t>(n * mask.columns + columns[i])) + key);
        float& value = row[columns[i]];
        value = fp16 ? round_stochastically<true>(value, random) : round_stochastically<false>(value, random);
      }
    }
  });
  return sum;
}

// x W'^T + bias for the rounded W', in T and rounded once.
template <typename T>
Tensor forward_rounded(const Tensor& x, const Tensor& rounded, const Optional& bias) {
  const ScalarType type = dtype_of<T>();
  return as_type(linear(as_type(x, type), as_type(rounded, type), as_type(bias, type)), x.scalar_type());
}

// dy W' for dy [..., N].
template <typename T>
Tensor input_gradient_rounded(const Tensor& dy, const Tensor& rounded) {
  const Rows rows = as_rows<T>(dy, rounded.size(0));
  const Tensor dx = empty_rows(dy, rounded.size(1), dtype_of<T>());
  matmul_out(as_two_dimensions(dx, rounded.size(1)), rows.tensor, as_type(rounded, dtype_of<T>()));
  return as_type(dx, dy.scalar_type());
}

}  // namespace fade
