// Weight and delta as one matrix: added in the compute type and rounded once, to nearest or, for training with one
// product in 16 bits, stochastically.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "common/dtype.h"
#include "common/stochastic.h"
#include "cpu/kernel.h"
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

inline bool has_16_bits(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

// out[i] = values[i], rounded stochastically by the random bits of the layer's element first + columns[i].
template <bool kHalf>
FADE_HOST_DEVICE void round_row(const float* values, const int32_t* columns, int64_t count, uint32_t first,
                                uint32_t key, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t random = hash_bits(hash_bits(first + static_cast<uint32_t>(columns[i])) + key);
    const float rounded = round_stochastically<kHalf>(values[i], random);
    if constexpr (kHalf) {
      out[i] = to_half(rounded).bits;
    } else {
      out[i] = to_bfloat16(rounded).bits;
    }
  }
}

static FADE_CPU_CLONES void round_row_to_half(const float* values, const int32_t* columns, int64_t count,
                                              uint32_t first, uint32_t key, uint16_t* out) {
  round_row<true>(values, columns, count, first, key, out);
}

static FADE_CPU_CLONES void round_row_to_bfloat16(const float* values, const int32_t* columns, int64_t count,
                                                  uint32_t first, uint32_t key, uint16_t* out) {
  round_row<false>(values, columns, count, first, key, out);
}

// out [N, K] = weight (or 0) + delta, added in fp32 and rounded stochastically to 16 bits. What is not in the mask is
// representable and stays. out may be the weight. key: rounding_key.
template <typename Element>  // Half or BFloat16
void add_stochastically(const Delta<float>& delta, const Element* weight, Element* out, uint32_t key) {
  const Mask& mask = delta.mask;
  const int32_t* columns = mask.positions();
  constexpr auto round = std::is_same_v<Element, Half> ? round_row_to_half : round_row_to_bfloat16;
  torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
    Buffer<float> exact(mask.columns);
    Buffer<uint16_t> rounded(mask.columns);
    for (int64_t n = begin; n < end; ++n) {
      Element* target = out + n * mask.columns;
      if (!weight) {
        std::fill_n(target, mask.columns, Element{0});
      } else if (weight != out) {
        std::copy_n(weight + n * mask.columns, mask.columns, target);
      }
      const int32_t* at = columns + mask.offsets[n];
      const int64_t count = mask.count(n);
      const float* values = delta.row(n, exact.get());
      // Two loops: product and sum are rounded each, as in the definition, so that the bits are the same.
      for (int64_t i = 0; i < count; ++i) exact.get()[i] = delta.scale * values[i];
      for (int64_t i = 0; i < count; ++i) exact.get()[i] += to_float(target[at[i]]);
      round(exact.get(), at, count, static_cast<uint32_t>(n * mask.columns), key, rounded.get());
      for (int64_t i = 0; i < count; ++i) target[at[i]].bits = rounded.get()[i];
    }
  });
}

// `store_effective_weight` with stochastic rounding, for 16 bits.
inline void store_stochastically(const Tensor& out, const Optional& weight, const Delta<float>& delta, uint32_t key) {
  const ScalarType dtype = out.scalar_type();
  check_matrix(out, delta.mask, "out");
  if (weight) check_matrix(*weight, delta.mask, "weight");
  STD_TORCH_CHECK(!weight || weight->scalar_type() == dtype, "out and weight must have one dtype");
  const Optional dense = weight ? Optional(as_dense(*weight)) : weight;
  Tensor result = out.is_contiguous() ? out : torch::stable::new_empty(out, {delta.mask.rows, delta.mask.columns});
  if (dtype == ScalarType::Half) {
    add_stochastically(delta, dense ? read<Half>(*dense) : nullptr, write<Half>(result), key);
  } else {
    add_stochastically(delta, dense ? read<BFloat16>(*dense) : nullptr, write<BFloat16>(result), key);
  }
  Tensor target = out;
  if (!out.is_contiguous()) torch::stable::copy_(target, result);
}

// The weight of the one-product mode in the dtype of `like`: `rounded` where it was made beforehand, else, with a seed,
// W + delta in scratch. Nothing in the exact mode, and where nothing would be rounded to 16 bits.
template <typename T>
Optional one_product_weight(const Tensor& like, const Optional& weight, const Delta<T>& delta,
                            const std::optional<int64_t>& seed, const Optional& rounded) {
  if (rounded || !seed || !has_16_bits(like.scalar_type())) return rounded;
  if constexpr (std::is_same_v<T, float>) {
    const Tensor out = scratch(like, delta.mask.rows, delta.mask.columns, like.scalar_type(), sizeof(uint16_t));
    store_stochastically(out, weight, delta, rounding_key(0, *seed));
    return out;
  }
  return rounded;
}

}  // namespace fade
