// The gradient of the delta, dY^T X at the mask's positions, and its contraction with the factors.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cost.h"
#include "cpu/mask.h"
#include "cpu/products.h"
#include "cpu/rows.h"

namespace fade {

constexpr int64_t kPartialValues = 1 << 20;  // most gradient values held in partial sums

// How the rows of x and dy, and those of the mask, are shared out while a gradient is sampled. A task has its own rows
// of x and dy, and, where x has too few rows for all threads, its own rows of the mask. The rows of x are cut into
// parts by the shape and the mask alone, each with its own sum, so the result does not depend on the number of threads.
struct SampledTasks {
  static constexpr int64_t kPanelRows = 8 * kLanes;

  SampledTasks(const Mask& mask, const Rows& x)
      : parts(std::clamp<int64_t>(std::min(kPartialValues / mask.count(), x.count / kPanelRows), 1, 16)),
        count_(x.count) {
    const int64_t threads = torch::stable::get_num_threads();
    groups = std::min((threads + parts - 1) / parts, (mask.rows + kBand - 1) / kBand);
    group_rows = (mask.rows + groups - 1) / groups;
  }

  // First row of x of a part.
  int64_t cut(int64_t part) const {
    return part == parts ? count_ : count_ * part / parts / kPanelRows * kPanelRows;
  }

  int64_t parts, groups, group_rows;

 private:
  int64_t count_;
};

// gradient [nnz] = sum_t dy[t, n] x[t, k] at the mask's positions, from transposed panels. With `transposed`, the delta
// by columns, the same panels of dy also serve dx [T, K] += dy delta; a task must then have all rows of the mask.
template <typename T>
void sampled_gradient(const Mask& mask, const SampledTasks& tasks, const Rows& dy, const Rows& x, T* gradient,
                      const SparseRows<T>* transposed = nullptr, T* dx = nullptr) {
  const int64_t k = mask.columns, n = mask.rows, count = mask.count(), widest = SampledTasks::kPanelRows;
  const int64_t block = std::min(k, std::max<int64_t>(64, 8 * n * k / count));  // about 8 positions of a row
  const int32_t* columns = mask.positions();
  Buffer<T> partial((tasks.parts - 1) * count);
  share_tasks(tasks.parts * tasks.groups, x.count * (n + k), [&](TaskQueue& queue) {
    // For dx all of dy's panel is kept, else a band at a time.
    Buffer<T> x_panel(k * widest), dy_panel((transposed ? n : kBand) * widest),
        dx_panel(transposed ? kBand * widest : 0);
    int64_t cursor[kBand];
    for (int64_t i; queue.next(i);) {
      const int64_t part = i / tasks.groups, first = i % tasks.groups * tasks.group_rows;
      const int64_t last = std::min(n, first + tasks.group_rows);
      T* sum = part == 0 ? gradient : partial.get() + (part - 1) * count;
      if (first >= last) continue;
      std::fill(sum + mask.offsets[first], sum + mask.offsets[last], T(0));
      for (const Panel& panel : split_rows(tasks.cut(part), tasks.cut(part + 1), widest)) {
        kernels<T>().transpose_in(x.data<T>() + panel.first * x.stride, x.stride, panel.tall, k, x_panel.get(),
                                  panel.wide);
        for (int64_t band = first; band < last; band += kBand) {
          const int64_t end = std::min(last, band + kBand);
          T* dy_band = dy_panel.get() + (transposed ? band * panel.wide : 0);
          kernels<T>().transpose_in(dy.data<T>() + panel.first * dy.stride + band, dy.stride, panel.tall, end - band,
                                    dy_band, panel.wide);
          kernels<T>().sampled_rows[panel.level()](dy_band, x_panel.get(), band, end, k, block, mask.offsets.data(),
                                                   columns, cursor, sum);
        }
        if (transposed) add_panel_product(*transposed, panel, dy_panel.get(), dx_panel.get(), dx);
      }
    }
  });
  for (int64_t part = 0; part + 1 < tasks.parts; ++part) {
    const T* own = partial.get() + part * count;
    for (int64_t i = 0; i < count; ++i) gradient[i] += own[i];
  }
}

constexpr int64_t kTileRows = 256;  // rows of x and dy that pass through the tiles of a band at a time

// A band of 32 rows of the weight gradient, dense in the 32 x 32 tiles that hold a bit, nothing elsewhere.
template <typename T>
class TileBand {
 public:
  explicit TileBand(const Mask& mask)
      : mask_(mask),
        any_(mask.width),
        dy_block_(kTileRows * kTile),
        x_block_(kTileRows * kTile),
        tiles_(mask.width * kTile * kTile) {}

  bool occupied(int64_t w) const { return any_[w] != 0; }
  T* tile(int64_t w) const { return tiles_.get() + w * kTile * kTile; }  // [32, 32], columns 32 w and on

  // tile(w)[n, k] = sum_t dy[t, first + n] x[t, 32 w + k] for every occupied tile; 0 beyond the weight's edges.
  void compute(int64_t first, const Rows& dy, const Rows& x) {
    mask_.occupancy(first, any_.data());
    const int64_t rows = std::min(kTile, mask_.rows - first);
    for (int64_t w = 0; w < mask_.width; ++w) {
      if (occupied(w)) std::memset(tile(w), 0, kTile * kTile * sizeof(T));
    }
    for (int64_t t = 0; t < x.count; t += kTileRows) {
      const int64_t tall = std::min(kTileRows, x.count - t);
      copy_columns(dy, t, tall, first, rows, dy_block_.get());
      for (int64_t w = 0; w < mask_.width; ++w) {
        if (!occupied(w)) continue;
        const int64_t wide = std::min(kTile, mask_.columns - w * kTile);
        const T* x_tile = x.data<T>() + t * x.stride + w * kTile;
        if (wide < kTile) {  // the last columns, copied so that whole vectors can be read
          copy_columns(x, t, tall, w * kTile, wide, x_block_.get());
          x_tile = x_block_.get();
        }
        kernels<T>().outer_product_tile(dy_block_.get(), x_tile, wide < kTile ? kTile : x.stride, tall, tile(w));
      }
    }
  }

 private:
  // out [tall, 32] = the columns [column, column + wide) of the rows from t on, padded with 0.
  static void copy_columns(const Rows& rows, int64_t t, int64_t tall, int64_t column, int64_t wide, T* out) {
    for (int64_t i = 0; i < tall; ++i, out += kTile) {
      std::memcpy(out, rows.data<T>() + (t + i) * rows.stride + column, wide * sizeof(T));
      std::fill(out + wide, out + kTile, T(0));
    }
  }

  const Mask& mask_;
  std::vector<uint32_t> any_;
  Buffer<T> dy_block_, x_block_, tiles_;
};

// gradient [nnz] at the mask's positions, from the tiles.
template <typename T>
void tiled_gradient(const Mask& mask, const Rows& dy, const Rows& x, T* gradient) {
  share_tasks((mask.rows + kTile - 1) / kTile, x.count * mask.count(), [&](TaskQueue& queue) {
    TileBand<T> band(mask);
    for (int64_t i; queue.next(i);) {
      band.compute(i * kTile, dy, x);
      for (int64_t n = i * kTile; n < std::min(mask.rows, (i + 1) * kTile); ++n) {
        T* out = gradient + mask.offsets[n];
        for (int64_t w = 0; w < mask.width; ++w) {
          const T* row = band.tile(w) + (n - i * kTile) * kTile;
          for (uint32_t word = mask.row(n)[w]; word != 0; word &= word - 1) *out++ = row[__builtin_ctz(word)];
        }
      }
    }
  });
}

constexpr int64_t kGemmRows = 256;  // rows of the weight gradient that exist at a time

// Calls visit(first, rows, scratch [rows, K]) for every block of rows of dy^T x.
template <typename T, typename Visit>
void for_each_gradient_block(const Mask& mask, const Rows& dy, const Rows& x, Visit visit) {
  for (int64_t first = 0; first < mask.rows; first += kGemmRows) {
    const int64_t rows = std::min(kGemmRows, mask.rows - first);
    Tensor source = dy.tensor;
    const Tensor dy_block = torch::stable::transpose(torch::stable::narrow(source, 1, first, rows), 0, 1);
    const Tensor block = scratch<T>(x.tensor, rows, mask.columns);
    matmul_out(block, dy_block, x.tensor);
    visit(first, rows, block);
  }
}

// The values of a dense matrix at the mask's positions, [nnz].
template <typename T>
Buffer<T> values_at(const Mask& mask, const Tensor& dense) {
  Buffer<T> values(mask.count());
  const int32_t* columns = mask.positions();
  const T* source = read<T>(dense);
  torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = mask.offsets[n]; i < mask.offsets[n + 1]; ++i) {
        values.get()[i] = source[n * mask.columns + columns[i]];
      }
    }
  });
  return values;
}

// The gradient at the mask's positions, [nnz], unscaled.
template <typename T>
Buffer<T> gradient_values(const Mask& mask, const Rows& dy, const Rows& x, Regime regime) {
  check_same_count(dy, x);
  Buffer<T> gradient(mask.count());
  if (mask.count() == 0 || x.count == 0) {
    std::fill_n(gradient.get(), mask.count(), T(0));
  } else if (regime == Regime::kGather) {
    sampled_gradient(mask, SampledTasks(mask, x), dy, x, gradient.get());
  } else if (regime == Regime::kTile) {
    tiled_gradient(mask, dy, x, gradient.get());
  } else {
    const int32_t* columns = mask.positions();
    for_each_gradient_block<T>(mask, dy, x, [&](int64_t first, int64_t rows, const Tensor& block) {
      for (int64_t n = first; n < first + rows; ++n) {
        const T* row = read<T>(block) + (n - first) * mask.columns;
        for (int64_t i = mask.offsets[n]; i < mask.offsets[n + 1]; ++i) gradient.get()[i] = row[columns[i]];
      }
    });
  }
  return gradient;
}

template <typename T>
void scale_all(T* values, int64_t size, T scale) {
  for (int64_t i = 0; i < size; ++i) values[i] *= scale;
}

constexpr int64_t kParts = 8;              // most parts of rows that have a dA of their own
constexpr int64_t kPartValues = 16 << 10;  // set bits that make a part worth its sum

// dA and dB while they are summed: the rows are cut into parts of equal numbers of set bits, each with its own dA. The
// cut depends on the mask alone, so the result does not depend on the number of threads.
template <typename T>
class FactorSums {
 public:
  FactorSums(const Mask& mask, const Factors<T>& factors, const Tensor& db)
      : parts(std::clamp<int64_t>(mask.count() / kPartValues, 1, kParts)),
        mask_(mask),
        factors_(factors),
        size_(mask.columns * factors.padded),
        da_t_(parts * size_),
        db_padded_(factors.rank == factors.padded ? 0 : mask.rows * factors.padded),
        db_rows_(factors.rank == factors.padded ? write<T>(db) : db_padded_.get()) {}

  // First row of a part, a multiple of `unit`.
  int64_t cut(int64_t part, int64_t unit) const {
    if (part == parts) return mask_.rows;
    const auto at = std::lower_bound(mask_.offsets.begin(), mask_.offsets.end(), mask_.count() * part / parts);
    return (at - mask_.offsets.begin()) / unit * unit;
  }

  // [K, padded], zero.
  T* start_da_t(int64_t part) {
    T* da_t = da_t_.get() + part * size_;
    std::memset(da_t, 0, size_ * sizeof(T));
    return da_t;
  }

  T* db_rows() { return db_rows_; }  // [N, padded]

  void finish(T scale, const Tensor& da, const Tensor& db) {
    const int64_t k = mask_.columns, rank = factors_.rank, padded = factors_.padded;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t j = 0; j < size_; ++j) da_t_.get()[j] += da_t_.get()[part * size_ + j];
    }
    T *da_out = write<T>(da), *db_out = write<T>(db);
    std::fill_n(da_out, rank * k, T(0));
    kernels<T>().transpose_add(da_t_.get(), padded, rank, k, da_out, k);
    for (int64_t i = 0; rank != padded && i < mask_.rows; ++i) {
      std::memcpy(db_out + i * rank, db_rows_ + i * padded, rank * sizeof(T));
    }
    scale_all(da_out, rank * k, scale);
    scale_all(db_out, mask_.rows * rank, scale);
  }

  const int64_t parts;

 private:
  const Mask& mask_;
  const Factors<T>& factors_;
  const int64_t size_;
  Buffer<T> da_t_, db_padded_;
  T* db_rows_;
};

// dB = s G A^T and dA = s B^T G for the sparse G [nnz].
template <typename T>
void contract_sparse(const Mask& mask, const T* gradient, const Factors<T>& factors, T scale, const Tensor& da,
                     const Tensor& db) {
  const int32_t* columns = mask.positions();
  FactorSums<T> sums(mask, factors, db);
  share_tasks(sums.parts, mask.count() * factors.padded, [&](TaskQueue& queue) {
    for (int64_t i; queue.next(i);) {
      kernels<T>().contract_rows(sums.cut(i, 1), sums.cut(i + 1, 1), mask.offsets.data(), columns, gradient,
                                 factors.a_t(), factors.b_rows(), factors.padded, sums.db_rows(), sums.start_da_t(i));
    }
  });
  sums.finish(scale, da, db);
}

// The same for G = dy^T x, tile by tile: neither G nor its values at the mask exist.
template <typename T>
void contract_tiles(const Mask& mask, const Rows& dy, const Rows& x, const Factors<T>& factors, T scale,
                    const Tensor& da, const Tensor& db) {
  const int64_t padded = factors.padded;
  FactorSums<T> sums(mask, factors, db);
  share_tasks(sums.parts, x.count * mask.count(), [&](TaskQueue& queue) {
    TileBand<T> band(mask);
    Buffer<T> b_rows(kTile * padded), db_rows(kTile * padded);
    for (int64_t i; queue.next(i);) {
      T* da_t = sums.start_da_t(i);
      for (int64_t first = sums.cut(i, kTile); first < sums.cut(i + 1, kTile); first += kTile) {
        const int64_t rows = std::min(kTile, mask.rows - first);
        band.compute(first, dy, x);
        std::memset(b_rows.get(), 0, kTile * padded * sizeof(T));
        std::memset(db_rows.get(), 0, kTile * padded * sizeof(T));
        std::memcpy(b_rows.get(), factors.b_rows() + first * padded, rows * padded * sizeof(T));
        for (int64_t w = 0; w < mask.width; ++w) {
          if (!band.occupied(w)) continue;
          for (int64_t n = 0; n < rows; ++n) {
            kernels<T>().clear_outside(mask.row(first + n) + w, kTile, band.tile(w) + n * kTile);
          }
          kernels<T>().contract_tile(band.tile(w), std::min(kTile, mask.columns - w * kTile),
                                     factors.a_t() + w * kTile * padded, b_rows.get(), padded, db_rows.get(),
                                     da_t + w * kTile * padded);
        }
        std::memcpy(sums.db_rows() + first * padded, db_rows.get(), rows * padded * sizeof(T));
      }
    }
  });
  sums.finish(scale, da, db);
}

// Adds the contraction of one block of rows of a dense G, which is masked in place: dB's rows, and a part of dA;
// unscaled.
template <typename T>
void contract_block(const Mask& mask, int64_t first, int64_t rows, Tensor block, const Factors<T>& factors, Tensor db,
                    const Tensor& da_part, T* da) {
  torch::stable::parallel_for(0, rows, mask.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels<T>().clear_outside(mask.row(first + i), mask.columns, write<T>(block) + i * mask.columns);
    }
  });
  Tensor a = factors.a(), b = factors.b();
  matmul_out(torch::stable::narrow(db, 0, first, rows), block, torch::stable::transpose(a, 0, 1));
  Tensor b_block = torch::stable::narrow(b, 0, first, rows);
  matmul_out(da_part, torch::stable::transpose(b_block, 0, 1), block);
  const T* part = read<T>(da_part);
  for (int64_t i = 0; i < factors.rank * mask.columns; ++i) da[i] += part[i];
}

// The same for a dense G that exists only a block of rows at a time: blocks(visit) calls visit(first, rows, block).
template <typename T, typename Blocks>
void contract_blocks(const Mask& mask, const Factors<T>& factors, T scale, Tensor da, Tensor db, Blocks blocks) {
  torch::stable::zero_(da);
  const Tensor da_part = torch::stable::new_empty(factors.a(), {factors.rank, mask.columns});
  blocks([&](int64_t first, int64_t rows, const Tensor& block) {
    contract_block<T>(mask, first, rows, block, factors, db, da_part, write<T>(da));
  });
  scale_all(write<T>(da), da.numel(), scale);
  scale_all(write<T>(db), db.numel(), scale);
}

// dA [r, K], dB [N, r] in T, from a `gradient` [nnz] at the mask's positions where there is one already.
template <typename T>
std::tuple<Tensor, Tensor> factor_gradients(const Mask& mask, const Rows& dy, const Rows& x, const Factors<T>& factors,
                                            T scale, Regime forced, const T* gradient = nullptr) {
  check_same_count(dy, x);
  Tensor da = torch::stable::new_empty(factors.a(), {factors.rank, mask.columns});
  Tensor db = torch::stable::new_empty(factors.b(), {mask.rows, factors.rank});
  if (gradient) {
    contract_sparse<T>(mask, gradient, factors, scale, da, db);
    return {da, db};
  }
  const Regime regime = choose_gradient(forced, x.count, mask.rows, mask.columns, mask.count(), mask.occupied_tiles());
  if (regime == Regime::kWhole) {
    contract_blocks<T>(mask, factors, scale, da, db,
                       [&](auto visit) { for_each_gradient_block<T>(mask, dy, x, visit); });
  } else if (regime == Regime::kTile) {
    contract_tiles<T>(mask, dy, x, factors, scale, da, db);
  } else {
    contract_sparse<T>(mask, gradient_values<T>(mask, dy, x, regime).get(), factors, scale, da, db);
  }
  return {da, db};
}

// dX in T and the unscaled gradient at the mask's positions, both from the same transposed panels of dY.
template <typename T>
struct GatheredBackward {
  Tensor dx;
  Buffer<T> gradient;
};

// Where another way is cheaper, or where a task would not have all rows of the mask, nothing.
template <typename T>
std::optional<GatheredBackward<T>> gathered_backward(const Tensor& grad_output, const Rows& dy, const Rows& x,
                                                     const Optional& weight, const Delta<T>& delta, Regime forced) {
  const Mask& mask = delta.mask;
  const int64_t t = x.count, n = mask.rows, k = mask.columns;
  check_same_count(dy, x);
  if (t == 0 || mask.count() == 0) return {};
  const SampledTasks tasks(mask, x);
  if (tasks.groups > 1 || choose_gradient(forced, t, n, k, mask.count(), mask.occupied_tiles()) != Regime::kGather ||
      choose_product(forced, weight.has_value(), mask.filled(), t, n, k, mask.count(), cost::kSort, k) !=
          Product::kGather) {
    return {};
  }
  GatheredBackward<T> result{frozen_input_gradient<T>(grad_output, dy, weight, k), Buffer<T>(mask.count())};
  const SparseRows<T> transposed = delta.by_column();
  sampled_gradient(mask, tasks, dy, x, result.gradient.get(), &transposed, write<T>(result.dx));
  return result;
}

// What a backward operator returns for a gradient that nobody needs.
inline Tensor not_needed(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// dX in grad_output's dtype; what the adapter needs is made by adapter(dy, x, gradient), `gradient` being the one at
// the mask's positions where dX gave it on the way, else null. The mask is decoded, and 16 bits are widened, once for
// both. one_product: makes the weight of the one-product mode, which then makes dX alone.
template <typename T, typename OneProduct, typename Adapter>
Tensor backward(const Tensor& grad_output, const Tensor& x, const Optional& weight, const Delta<T>& delta,
                Regime regime, bool need_input, bool need_adapter, OneProduct one_product, Adapter adapter) {
  Optional dx;
  if (need_input) {
    if (const Optional rounded = one_product()) dx = one_product_input_gradient(grad_output, *rounded);
  }
  const bool exact_input = need_input && !dx;
  if (exact_input || need_adapter) {
    const Rows dy = as_rows<T>(grad_output, delta.mask.rows);
    const Optional frozen = exact_input ? as_type(weight, dtype_of<T>()) : Optional();
    std::optional<Rows> rows;
    std::optional<GatheredBackward<T>> both;
    if (need_adapter) rows = as_rows<T>(x, delta.mask.columns);
    if (rows && exact_input) both = gathered_backward(grad_output, dy, *rows, frozen, delta, regime);
    if (exact_input) {
      dx = as_type(both ? both->dx : input_gradient(grad_output, dy, frozen, delta, regime), grad_output.scalar_type());
    }
    if (rows) adapter(dy, *rows, both ? both->gradient.get() : nullptr);
  }
  return dx ? *dx : not_needed(grad_output);
}

}  // namespace fade
