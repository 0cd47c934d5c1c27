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

// y [T, N] += x delta^T, by panels of x.
template <typename T>
void add_product(const Delta<T>& delta, const Rows& x, T* y) {
  const Mask& mask = delta.mask;
  const int32_t* columns = mask.positions();
  const Buffer<T> values = delta.scaled_values();
  const std::vector<Panel> panels = split_rows(0, x.count, panel_rows(x.count));
  const int64_t widest = panels.empty() ? 0 : panels.front().wide;
  share_tasks(panels.size(), x.count * (mask.rows + mask.columns), [&](TaskQueue& queue) {
    Buffer<T> x_panel(mask.columns * widest), y_panel(kBand * widest);
    for (int64_t i; queue.next(i);) {
      const Panel panel = panels[i];
      kernels<T>().transpose_in(x.data<T>() + panel.first * x.stride, x.stride, panel.tall, mask.columns, x_panel.get(),
                                panel.wide);
      for (int64_t n = 0; n < mask.rows; n += kBand) {
        const int64_t end = std::min(mask.rows, n + kBand);
        kernels<T>().product_rows[panel.level()](x_panel.get(), n, end, mask.offsets.data(), columns, values.get(),
                                                 y_panel.get());
        kernels<T>().transpose_add(y_panel.get(), panel.wide, panel.tall, end - n, y + panel.first * mask.rows + n,
                                   mask.rows);
      }
    }
  });
}

// dx [T, K] += dy delta, by panels of dy.
template <typename T>
void add_transposed_product(const Delta<T>& delta, const Rows& dy, T* dx) {
  const Mask& mask = delta.mask;
  const int32_t* columns = mask.positions();
  const Buffer<T> values = delta.scaled_values();
  const std::vector<Panel> panels = split_rows(0, dy.count, panel_rows(dy.count));
  const int64_t widest = panels.empty() ? 0 : panels.front().wide;
  share_tasks(panels.size(), dy.count * (mask.rows + mask.columns), [&](TaskQueue& queue) {
    Buffer<T> dy_panel(kBand * widest), dx_panel(mask.columns * widest);
    for (int64_t i; queue.next(i);) {
      const Panel panel = panels[i];
      std::memset(dx_panel.get(), 0, mask.columns * panel.wide * sizeof(T));
      for (int64_t n = 0; n < mask.rows; n += kBand) {
        const int64_t end = std::min(mask.rows, n + kBand);
        kernels<T>().transpose_in(dy.data<T>() + panel.first * dy.stride + n, dy.stride, panel.tall, end - n,
                                  dy_panel.get(), panel.wide);
        kernels<T>().product_columns[panel.level()](dy_panel.get(), n, end, mask.offsets.data(), columns, values.get(),
                                                    dx_panel.get());
      }
      kernels<T>().transpose_add(dx_panel.get(), panel.wide, panel.tall, mask.columns, dx + panel.first * mask.columns,
                                 mask.columns);
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
                     cost::kRows) == Product::kEffectiveWeight) {
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
  add_product(delta, as_rows<T>(x, mask.columns), write<T>(y));
  return y;
}

// dy (W + delta), in T.
template <typename T>
Tensor input_gradient(const Tensor& dy, const Optional& weight, const Delta<T>& delta, Regime regime) {
  const Mask& mask = delta.mask;
  const Rows rows = as_rows<T>(dy, mask.rows);
  Tensor dx = empty_rows(dy, mask.columns, dtype_of<T>());
  const Tensor flat = as_two_dimensions(dx, mask.columns);
  const bool frozen = weight && mask.count() == 0;
  if (!frozen && choose_product(regime, weight.has_value(), mask.filled(), rows.count, mask.rows, mask.columns,
                                mask.count(), cost::kColumns) == Product::kEffectiveWeight) {
    matmul_out(flat, rows.tensor, delta.effective_weight(weight, dy));
    return dx;
  }
  if (weight) {
    matmul_out(flat, rows.tensor, *weight);
  } else {
    torch::stable::zero_(dx);
  }
  if (!frozen) add_transposed_product(delta, rows, write<T>(dx));
  return dx;
}

}  // namespace fade
