// Products with the frozen weight and the delta: the forward pass and the input gradient of masked LoRA.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cost.h"
#include "cpu/mask.h"
#include "cpu/rows.h"

namespace fade {

// Rows a panel takes when whole panels are handed to threads: as many as keep every thread busy.
inline int64_t panel_rows(int64_t rows) {
  int64_t wide = 8 * kLanes;
  while (wide > kLanes && (rows + wide - 1) / wide < torch::stable::get_num_threads()) wide /= 2;
  return wide;
}

constexpr int64_t kBand = 64;  // rows of the mask whose part of a panel is held in cache

// y [T, rows] += x matrix^T of a panel of x that is transposed already; y_panel: [kBand, wide] of scratch.
template <typename T>
void add_panel_product(const SparseRows<T>& matrix, const Panel& panel, const T* x_panel, T* y_panel, T* y) {
  for (int64_t n = 0; n < matrix.rows; n += kBand) {
    const int64_t end = std::min(matrix.rows, n + kBand);
    kernels<T>().product_rows[panel.level()](x_panel, n, end, matrix.offsets, matrix.index, matrix.values.get(),
                                             y_panel);
    kernels<T>().transpose_add(y_panel, panel.wide, panel.tall, end - n, y + panel.first * matrix.rows + n,
                               matrix.rows);
  }
}

// y [T, rows] += x matrix^T, by panels of x [T, columns].
template <typename T>
void add_product(const SparseRows<T>& matrix, const Rows& x, T* y) {
  const std::vector<Panel> panels = split_rows(0, x.count, panel_rows(x.count));
  const int64_t widest = panels.empty() ? 0 : panels.front().wide;
  share_tasks(panels.size(), x.count * (matrix.rows + matrix.columns), [&](TaskQueue& queue) {
    Buffer<T> x_panel(matrix.columns * widest), y_panel(kBand * widest);
    for (int64_t i; queue.next(i);) {
      const Panel panel = panels[i];
      kernels<T>().transpose_in(x.data<T>() + panel.first * x.stride, x.stride, panel.tall, matrix.columns,
                                x_panel.get(), panel.wide);
      add_panel_product(matrix, panel, x_panel.get(), y_panel.get(), y);
    }
  });
}

// x (W + delta)^T + bias, in T; with an empty mask exactly what the frozen layer gives, in x's own dtype.
template <typename T>
Tensor forward(const Tensor& given_x, const Optional& given_weight, const Optional& given_bias, const Delta<T>& delta,
               Regime regime) {
  const Mask& mask = delta.mask;
  if (given_weight && mask.count() == 0) return linear(given_x, *given_weight, given_bias);
  const Tensor x = as_type(given_x, dtype_of<T>());
  const Optional weight = as_type(given_weight, dtype_of<T>()), bias = as_type(given_bias, dtype_of<T>());
  const int64_t t = row_count(x);
  if (choose_product(regime, weight.has_value(), mask.filled(), t, mask.rows, mask.columns, mask.count(),
                     0.0, mask.rows + mask.columns) == Product::kEffectiveWeight) {
    return linear(x, delta.effective_weight(weight, x), bias);
  }
  Tensor y;
  if (weight) {
    y = linear(x, *weight, bias);
  } else {
    y = empty_rows(x, mask.rows, dtype_of<T>());
    torch::stable::zero_(y);
    if (bias) torch::stable::copy_(y, *bias);
  }
  add_product(delta.by_row(), as_rows<T>(x, mask.columns), write<T>(y));
  return y;
}

// dy W of the one-product mode, in grad_output's dtype.
inline Tensor one_product_input_gradient(const Tensor& grad_output, const Tensor& weight) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(grad_output.dim() >= 1 && grad_output.size(grad_output.dim() - 1) == rows, "rows must end in ", rows,
                  " features");
  const Tensor dx = empty_rows(grad_output, columns, grad_output.scalar_type());
  const Tensor dy = torch::stable::reshape(grad_output, {row_count(grad_output), rows});
  matmul_out(as_two_dimensions(dx, columns), dy, weight);
  return dx;
}

// dy W in T, or 0 without W: [..., K] with the leading dimensions of `grad_output`.
template <typename T>
Tensor frozen_input_gradient(const Tensor& grad_output, const Rows& dy, const Optional& weight, int64_t columns) {
  const Tensor dx = empty_rows(grad_output, columns, dtype_of<T>());
  if (weight) {
    matmul_out(as_two_dimensions(dx, columns), dy.tensor, *weight);
  } else {
    Tensor zero = dx;
    torch::stable::zero_(zero);
  }
  return dx;
}

// dy (W + delta), in T.
template <typename T>
Tensor input_gradient(const Tensor& grad_output, const Rows& dy, const Optional& weight, const Delta<T>& delta,
                      Regime regime) {
  const Mask& mask = delta.mask;
  const bool frozen = weight && mask.count() == 0;
  if (!frozen && choose_product(regime, weight.has_value(), mask.filled(), dy.count, mask.rows, mask.columns,
                                mask.count(), cost::kSort, mask.rows + mask.columns) == Product::kEffectiveWeight) {
    const Tensor dx = empty_rows(grad_output, mask.columns, dtype_of<T>());
    matmul_out(as_two_dimensions(dx, mask.columns), dy.tensor, delta.effective_weight(weight, grad_output));
    return dx;
  }
  const Tensor dx = frozen_input_gradient<T>(grad_output, dy, weight, mask.columns);
  if (!frozen) add_product(delta.by_column(), dy, write<T>(dx));
  return dx;
}

}  // namespace fade
