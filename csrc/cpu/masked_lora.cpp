// Masked LoRA on the CPU: y = x (W + s M o (B A))^T, its input gradient and its factor gradients, and the same with the
// delta given by its values. Dense work goes to torch's BLAS; what the mask makes sparse is done here, by the regime
// that cost.h predicts to be fastest. Here: the operators. Definitions: fade_kernels/reference.py.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cost.h"
#include "cpu/gradients.h"
#include "cpu/mask.h"
#include "cpu/merging.h"
#include "cpu/products.h"
#include "cpu/rows.h"

namespace fade {
namespace {

Tensor masked_lora_linear(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& lora_a,
                          const Tensor& lora_b, const Tensor& mask_words, const Tensor& scale, int64_t regime,
                          std::optional<int64_t> seed, const Optional& rounded) {
  if (rounded) return linear(x, *rounded, bias);
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, static_cast<T>(scalar_value(scale)));
    const Optional one_product = one_product_weight(x, weight, delta, seed, rounded);
    const Tensor y = one_product ? linear(x, *one_product, bias) : forward(x, weight, bias, delta, Regime{regime});
    return as_type(y, x.scalar_type());
  });
}

Tensor masked_lora_linear_input_gradient(const Tensor& grad_output, const Optional& weight, const Tensor& lora_a,
                                         const Tensor& lora_b, const Tensor& mask_words, const Tensor& scale,
                                         int64_t regime, std::optional<int64_t> seed, const Optional& rounded) {
  if (rounded) return one_product_input_gradient(grad_output, *rounded);
  return with_compute_type(grad_output, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, static_cast<T>(scalar_value(scale)));
    const Optional one_product = one_product_weight(grad_output, weight, delta, seed, rounded);
    if (one_product) return one_product_input_gradient(grad_output, *one_product);
    const Rows dy = as_rows<T>(grad_output, mask.rows);
    const Tensor dx = input_gradient(grad_output, dy, as_type(weight, dtype_of<T>()), delta, Regime{regime});
    return as_type(dx, grad_output.scalar_type());
  });
}

std::tuple<Tensor, Tensor> masked_lora_linear_factor_gradients(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& lora_a, const Tensor& lora_b,
                                                               const Tensor& mask_words, const Tensor& scale,
                                                               int64_t regime) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const auto [da, db] = factor_gradients<T>(mask, as_rows<T>(grad_output, mask.rows), as_rows<T>(x, mask.columns),
                                              factors, static_cast<T>(scalar_value(scale)), Regime{regime});
    return std::make_tuple(as_type(da, lora_a.scalar_type()), as_type(db, lora_b.scalar_type()));
  });
}

// dX and the factor gradients; what is not needed comes back empty, [0].
std::tuple<Tensor, Tensor, Tensor> masked_lora_linear_backward(
    const Tensor& grad_output, const Tensor& x, const Optional& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& mask_words, const Tensor& scale, int64_t regime, bool need_input, bool need_factors,
    std::optional<int64_t> seed, const Optional& rounded) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, static_cast<T>(scalar_value(scale)));
    Optional da, db;
    const auto one_product = [&] { return one_product_weight(grad_output, weight, delta, seed, rounded); };
    const auto adapter = [&](const Rows& dy, const Rows& rows, const T* gradient) {
      std::tie(da, db) = factor_gradients<T>(mask, dy, rows, factors, delta.scale, Regime{regime}, gradient);
    };
    const Tensor dx =
        backward(grad_output, x, weight, delta, Regime{regime}, need_input, need_factors, one_product, adapter);
    if (!da) return std::make_tuple(dx, not_needed(lora_a), not_needed(lora_b));
    return std::make_tuple(dx, as_type(*da, lora_a.scalar_type()), as_type(*db, lora_b.scalar_type()));
  });
}

// Contracts a dense weight gradient [N, K] (a convolution's, or the effective weight's) with the factors under the
// mask.
std::tuple<Tensor, Tensor> masked_factor_gradients(const Tensor& weight_gradient, const Tensor& lora_a,
                                                   const Tensor& lora_b, const Tensor& mask_words,
                                                   const Tensor& scale) {
  return with_compute_type(weight_gradient, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    check_matrix(weight_gradient, mask, "weight_gradient");
    const Factors<T> factors(lora_a, lora_b);
    const Tensor dense = as_dense(as_type(weight_gradient, dtype_of<T>()));
    const T factor = static_cast<T>(scalar_value(scale));
    Tensor da = torch::stable::new_empty(factors.a(), {factors.rank, mask.columns});
    Tensor db = torch::stable::new_empty(factors.b(), {mask.rows, factors.rank});
    const double size = static_cast<double>(mask.rows) * mask.columns;
    if (cost::kContract * mask.count() < (cost::kContractBlock + cost::kCopy) * size) {
      const Buffer<T> gradient = values_at<T>(mask, dense);
      contract_sparse<T>(mask, gradient.get(), factors, factor, da, db);
    } else {
      contract_blocks<T>(mask, factors, factor, da, db, [&](auto visit) {
        for (int64_t first = 0; first < mask.rows; first += kGemmRows) {
          const int64_t rows = std::min(kGemmRows, mask.rows - first);
          Tensor source = dense, block = scratch<T>(dense, rows, mask.columns);
          torch::stable::copy_(block, torch::stable::narrow(source, 0, first, rows));
          visit(first, rows, block);
        }
      });
    }
    return std::make_tuple(as_type(da, lora_a.scalar_type()), as_type(db, lora_b.scalar_type()));
  });
}

Tensor masked_values_linear(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& values,
                            const Tensor& mask_words, const Tensor& scale, int64_t regime,
                            std::optional<int64_t> seed, const Optional& rounded) {
  if (rounded) return linear(x, *rounded, bias);
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, mask_words.size(0), x.size(x.dim() - 1));
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    const Delta<T> delta(mask, read<T>(dense), static_cast<T>(scalar_value(scale)));
    const Optional one_product = one_product_weight(x, weight, delta, seed, rounded);
    const Tensor y = one_product ? linear(x, *one_product, bias) : forward(x, weight, bias, delta, Regime{regime});
    return as_type(y, x.scalar_type());
  });
}

Tensor masked_values_linear_input_gradient(const Tensor& grad_output, const Optional& weight, const Tensor& values,
                                           const Tensor& mask_words, const Tensor& scale, int64_t in_features,
                                           int64_t regime, std::optional<int64_t> seed, const Optional& rounded) {
  if (rounded) return one_product_input_gradient(grad_output, *rounded);
  return with_compute_type(grad_output, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, mask_words.size(0), in_features);
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    const Delta<T> delta(mask, read<T>(dense), static_cast<T>(scalar_value(scale)));
    const Optional one_product = one_product_weight(grad_output, weight, delta, seed, rounded);
    if (one_product) return one_product_input_gradient(grad_output, *one_product);
    const Rows dy = as_rows<T>(grad_output, mask.rows);
    const Tensor dx = input_gradient(grad_output, dy, as_type(weight, dtype_of<T>()), delta, Regime{regime});
    return as_type(dx, grad_output.scalar_type());
  });
}

// s times a gradient [nnz] at the mask's positions, in the dtype of the values.
template <typename T>
Tensor values_gradient(const Mask& mask, const Tensor& values, T scale, const T* gradient) {
  STD_TORCH_CHECK(values.numel() == mask.count(), "values has ", values.numel(), " elements, but the mask has ",
                  mask.count(), " set bits");
  const Tensor result = torch::stable::new_empty(values, {mask.count()}, dtype_of<T>());
  T* out = write<T>(result);
  for (int64_t i = 0; i < mask.count(); ++i) out[i] = scale * gradient[i];
  return as_type(result, values.scalar_type());
}

template <typename T>
Tensor values_gradient(const Mask& mask, const Tensor& values, T scale, const Rows& dy, const Rows& x, Regime forced) {
  const Regime regime = choose_gradient(forced, x.count, mask.rows, mask.columns, mask.count(), mask.occupied_tiles());
  return values_gradient<T>(mask, values, scale, gradient_values<T>(mask, dy, x, regime).get());
}

Tensor masked_values_linear_gradient(const Tensor& grad_output, const Tensor& x, const Tensor& values,
                                     const Tensor& mask_words, const Tensor& scale, int64_t regime) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, mask_words.size(0), x.size(x.dim() - 1));
    return values_gradient<T>(mask, values, static_cast<T>(scalar_value(scale)), as_rows<T>(grad_output, mask.rows),
                              as_rows<T>(x, mask.columns), Regime{regime});
  });
}

// dX and the values' gradient; what is not needed comes back empty, [0].
std::tuple<Tensor, Tensor> masked_values_linear_backward(const Tensor& grad_output, const Tensor& x,
                                                         const Optional& weight, const Tensor& values,
                                                         const Tensor& mask_words, const Tensor& scale, int64_t regime,
                                                         bool need_input, bool need_values,
                                                         std::optional<int64_t> seed, const Optional& rounded) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, mask_words.size(0), x.size(x.dim() - 1));
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    const Delta<T> delta(mask, read<T>(dense), static_cast<T>(scalar_value(scale)));
    Optional dv;
    const auto one_product = [&] { return one_product_weight(grad_output, weight, delta, seed, rounded); };
    const auto adapter = [&](const Rows& dy, const Rows& rows, const T* gradient) {
      dv = gradient ? values_gradient(mask, values, delta.scale, gradient)
                    : values_gradient(mask, values, delta.scale, dy, rows, Regime{regime});
    };
    const Tensor dx =
        backward(grad_output, x, weight, delta, Regime{regime}, need_input, need_values, one_product, adapter);
    return std::make_tuple(dx, dv ? *dv : not_needed(values));
  });
}

Tensor masked_factor_values(const Tensor& lora_a, const Tensor& lora_b, const Tensor& mask_words, int64_t count) {
  return with_compute_type(lora_a, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    STD_TORCH_CHECK(count == mask.count(), "count is ", count, ", but the mask has ", mask.count(), " set bits");
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, T(1));
    Tensor values = torch::stable::new_empty(lora_a, {count}, dtype_of<T>());
    torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) delta.row(n, write<T>(values) + mask.offsets[n]);
    });
    return values;
  });
}

void effective_weight_out(Tensor out, const Optional& weight, const Tensor& lora_a, const Tensor& lora_b,
                          const Tensor& mask_words, const Tensor& scale) {
  with_compute_type(out, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    store_effective_weight(out, weight, Delta<T>(mask, factors, static_cast<T>(scalar_value(scale))));
  });
}

Tensor effective_weight(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Tensor& mask_words,
                        const Tensor& scale) {
  const Tensor out = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  effective_weight_out(out, weight, lora_a, lora_b, mask_words, scale);
  return out;
}

void effective_weights_out(std::vector<Tensor> out, std::vector<Tensor> weight, std::vector<Tensor> lora_a,
                           std::vector<Tensor> lora_b, std::vector<Tensor> mask_words, std::vector<Tensor> scale,
                           bool stochastic, int64_t seed) {
  for (size_t i = 0; i < out.size(); ++i) {
    if (!stochastic || !has_16_bits(out[i].scalar_type())) {
      effective_weight_out(out[i], weight[i], lora_a[i], lora_b[i], mask_words[i], scale[i]);
      continue;
    }
    const Mask mask(mask_words[i], lora_b[i].size(0), lora_a[i].size(1));
    const Factors<float> factors(lora_a[i], lora_b[i]);
    const Delta<float> delta(mask, factors, static_cast<float>(scalar_value(scale[i])));
    store_stochastically(out[i], weight[i], delta, rounding_key(i, seed));
  }
}

void effective_weight_from_values_out(Tensor out, const Optional& weight, const Tensor& values,
                                      const Tensor& mask_words, const Tensor& scale) {
  with_compute_type(out, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, out.size(0), out.size(1));
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    store_effective_weight(out, weight, Delta<T>(mask, read<T>(dense), static_cast<T>(scalar_value(scale))));
  });
}

void effective_weights_from_values_out(std::vector<Tensor> out, std::vector<Tensor> weight, std::vector<Tensor> values,
                                       std::vector<Tensor> mask_words, std::vector<Tensor> scale, bool stochastic,
                                       int64_t seed) {
  for (size_t i = 0; i < out.size(); ++i) {
    if (!stochastic || !has_16_bits(out[i].scalar_type())) {
      effective_weight_from_values_out(out[i], weight[i], values[i], mask_words[i], scale[i]);
      continue;
    }
    const Mask mask(mask_words[i], out[i].size(0), out[i].size(1));
    const Tensor dense = checked_values(values[i], mask, ScalarType::Float);
    const Delta<float> delta(mask, read<float>(dense), static_cast<float>(scalar_value(scale[i])));
    store_stochastically(out[i], weight[i], delta, rounding_key(i, seed));
  }
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m) {
  m.impl("masked_lora_linear", TORCH_BOX(&fade::masked_lora_linear));
  m.impl("masked_lora_linear_input_gradient", TORCH_BOX(&fade::masked_lora_linear_input_gradient));
  m.impl("masked_lora_linear_factor_gradients", TORCH_BOX(&fade::masked_lora_linear_factor_gradients));
  m.impl("masked_lora_linear_backward", TORCH_BOX(&fade::masked_lora_linear_backward));
  m.impl("masked_factor_gradients", TORCH_BOX(&fade::masked_factor_gradients));
  m.impl("masked_values_linear", TORCH_BOX(&fade::masked_values_linear));
  m.impl("masked_values_linear_input_gradient", TORCH_BOX(&fade::masked_values_linear_input_gradient));
  m.impl("masked_values_linear_gradient", TORCH_BOX(&fade::masked_values_linear_gradient));
  m.impl("masked_values_linear_backward", TORCH_BOX(&fade::masked_values_linear_backward));
  m.impl("masked_factor_values", TORCH_BOX(&fade::masked_factor_values));
  m.impl("effective_weight", TORCH_BOX(&fade::effective_weight));
  m.impl("effective_weight_out", TORCH_BOX(&fade::effective_weight_out));
  m.impl("effective_weights_out", TORCH_BOX(&fade::effective_weights_out));
  m.impl("effective_weight_from_values_out", TORCH_BOX(&fade::effective_weight_from_values_out));
  m.impl("effective_weights_from_values_out", TORCH_BOX(&fade::effective_weights_from_values_out));
}
