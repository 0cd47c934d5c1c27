// The sparse side of masked LoRA: a packed mask, the factors laid out for the inner loops, and the delta they make.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/mask_words.h"
#include "cpu/masked_lora_kernels.h"
#include "cpu/rows.h"

namespace fade {

// A packed mask with the position of every row's first value and, once decoded, the column of every value. Neither is
// kept from call to call, where it would be memory for every layer and could be out of date; a decoding serves all
// gradients of a backward pass.
class Mask {
 public:
  Mask(const Tensor& words, int64_t rows, int64_t columns)
      : columns(columns),
        rows(rows),
        width(words_per_row(columns)),
        offsets(rows + 1, 0),
        dense_(valid_words(words, rows, columns)) {
    STD_TORCH_CHECK(columns < (int64_t{1} << 31), "more than 2^31 columns");
    words_ = read<uint32_t>(dense_);
    std::atomic<int64_t> occupied_words{0};
    torch::stable::parallel_for(0, rows, 8 * grain(), [&](int64_t begin, int64_t end) {
      occupied_words += kernels<float>().count_rows(row(begin), end - begin, width, &offsets[begin + 1]);
    });
    for (int64_t n = 0; n < rows; ++n) offsets[n + 1] += offsets[n];
    filled_ = count() >= kFilledWord * occupied_words;
  }

  const uint32_t* row(int64_t n) const { return words_ + n * width; }
  int64_t count() const { return offsets.back(); }
  int64_t count(int64_t n) const { return offsets[n + 1] - offsets[n]; }
  // Whether the words that hold bits hold so many that whole words are cheaper than single positions.
  bool filled() const { return filled_; }
  int64_t grain() const { return std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, columns)); }

  int64_t occupied_tiles() const {
    int64_t tiles = 0;
    std::vector<uint32_t> any(width);
    for (int64_t band = 0; band < rows; band += kTile) {
      occupancy(band, any.data());
      for (const uint32_t word : any) tiles += word != 0;
    }
    return tiles;
  }

  // any[w] = the words of the band's rows, or-ed.
  void occupancy(int64_t band, uint32_t* any) const {
    std::fill_n(any, width, 0u);
    for (int64_t n = band; n < std::min(rows, band + kTile); ++n) {
      for (int64_t w = 0; w < width; ++w) any[w] |= row(n)[w];
    }
  }

  // The columns of all set bits, row by row; decoded on first use, which must be outside of parallel code.
  const int32_t* positions() const {
    if (!positions_.get()) {
      positions_ = Buffer<int32_t>(count());
      torch::stable::parallel_for(0, rows, 8 * grain(), [&](int64_t begin, int64_t end) {
        kernels<float>().decode(words_, begin * width, end * width, width, offsets[end] - offsets[begin],
                                positions_.get() + offsets[begin]);
      });
    }
    return positions_.get();
  }

  const int64_t columns, rows, width;
  std::vector<int64_t> offsets;  // [rows + 1]

 private:
  static constexpr int64_t kFilledWord = 8;

  Tensor dense_;
  const uint32_t* words_;
  bool filled_ = false;
  mutable Buffer<int32_t> positions_;
};

inline void check_matrix(const Tensor& matrix, const Mask& mask, const char* name) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == mask.rows && matrix.size(1) == mask.columns, name, " must be [",
                  mask.rows, ", ", mask.columns, "]");
}

// A [r, K] and B [N, r] in the layouts of the inner loops.
template <typename T>
class Factors {
 public:
  Factors(const Tensor& lora_a, const Tensor& lora_b)
      : rank(lora_a.size(0)),
        padded((rank + kLanes - 1) / kLanes * kLanes),
        k_(lora_a.size(1)),
        a_(as_dense(as_type(lora_a, dtype_of<T>()))),
        b_(as_dense(as_type(lora_b, dtype_of<T>()))),
        a_t_(k_ * padded) {
    STD_TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2 && lora_b.size(1) == rank, "A [r, K] and B [N, r] do not fit");
    kernels<T>().transpose_in(read<T>(a_), k_, rank, k_, a_t_.get(), padded);
    const int64_t n = lora_b.size(0);
    if (rank == padded) return;
    b_padded_ = Buffer<T>(n * padded);
    std::memset(b_padded_.get(), 0, n * padded * sizeof(T));
    for (int64_t i = 0; i < n; ++i) std::memcpy(b_padded_.get() + i * padded, read<T>(b_) + i * rank, rank * sizeof(T));
  }

  const Tensor& a() const { return a_; }                                              // [r, K]
  const Tensor& b() const { return b_; }                                              // [N, r]
  const T* a_t() const { return a_t_.get(); }                                         // [K, padded]
  const T* b_rows() const { return rank == padded ? read<T>(b_) : b_padded_.get(); }  // [N, padded]

  const int64_t rank, padded;

 private:
  const int64_t k_;
  Tensor a_, b_;
  Buffer<T> a_t_, b_padded_;
};

// A sparse matrix in compressed rows, as the inner loops of a product take it.
template <typename T>
struct SparseRows {
  int64_t rows, columns;
  const int64_t* offsets;  // [rows + 1]
  const int32_t* index;    // [nnz]: columns
  Buffer<T> values;        // [nnz]
  std::vector<int64_t> own_offsets = {};
  Buffer<int32_t> own_index = {};
};

// The sparse matrix s M o (B A), or s scatter(values), row by row.
template <typename T>
class Delta {
 public:
  Delta(const Mask& mask, const Factors<T>& factors, T scale) : mask(mask), scale(scale), factors_(&factors) {
    if (!mask.filled()) {
      mask.positions();
      return;
    }
    const int64_t wide = mask.width * kWordBits;
    a_padded_ = read<T>(factors.a());
    if (mask.columns == wide) return;
    own_ = Buffer<T>(factors.rank * wide);
    std::memset(own_.get(), 0, factors.rank * wide * sizeof(T));
    for (int64_t i = 0; i < factors.rank; ++i) {
      std::memcpy(own_.get() + i * wide, a_padded_ + i * mask.columns, mask.columns * sizeof(T));
    }
    a_padded_ = own_.get();
  }

  Delta(const Mask& mask, const T* values, T scale) : mask(mask), scale(scale), values_(values) {
    if (!mask.filled()) mask.positions();
  }

  // The unscaled values of row n, in `buffer` unless they exist already.
  const T* row(int64_t n, T* buffer) const {
    if (!factors_) return values_ + mask.offsets[n];
    const T* b = factors_->b_rows() + n * factors_->padded;
    if (mask.filled()) {
      kernels<T>().factor_values(mask.row(n), mask.width, a_padded_, b, factors_->rank, buffer);
    } else {
      kernels<T>().factor_values_at(mask.positions() + mask.offsets[n], mask.count(n), factors_->a_t(), b,
                                    factors_->padded, buffer);
    }
    return buffer;
  }

  // The delta [N, K]; offsets and index are the mask's.
  SparseRows<T> by_row() const {
    return {mask.rows, mask.columns, mask.offsets.data(), mask.positions(), scaled_values()};
  }

  // Its transpose [K, N], by a counting sort: less work than products that add to all of dX for every row of dY.
  SparseRows<T> by_column() const {
    const int32_t* columns = mask.positions();
    const Buffer<T> values = scaled_values();
    const int64_t count = mask.count();
    std::vector<int64_t> offsets(mask.columns + 1, 0), next;
    for (int64_t i = 0; i < count; ++i) ++offsets[columns[i] + 1];
    for (int64_t k = 0; k < mask.columns; ++k) offsets[k + 1] += offsets[k];
    next.assign(offsets.begin(), offsets.end());
    SparseRows<T> result{mask.columns, mask.rows, nullptr, nullptr, Buffer<T>(count), std::move(offsets),
                         Buffer<int32_t>(count)};
    for (int64_t n = 0; n < mask.rows; ++n) {
      for (int64_t i = mask.offsets[n]; i < mask.offsets[n + 1]; ++i) {
        const int64_t at = next[columns[i]]++;
        result.own_index.get()[at] = static_cast<int32_t>(n);
        result.values.get()[at] = values.get()[i];
      }
    }
    result.offsets = result.own_offsets.data();
    result.index = result.own_index.get();
    return result;
  }

  // out [N, K] = weight (or 0) + delta; out may be the weight.
  void add_to(const T* weight, T* out) const {
    torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
      Buffer<T> buffer(mask.columns);
      for (int64_t n = begin; n < end; ++n) {
        T* target = out + n * mask.columns;
        if (!weight) {
          std::fill_n(target, mask.columns, T(0));
        } else if (weight != out) {
          std::copy_n(weight + n * mask.columns, mask.columns, target);
        }
        const T* values = row(n, buffer.get());
        if (mask.filled()) {
          kernels<T>().scatter_add(mask.row(n), mask.width, values, scale, target);
        } else {
          kernels<T>().scatter_add_at(mask.positions() + mask.offsets[n], mask.count(n), values, scale, target);
        }
      }
    });
  }

  Tensor effective_weight(const Optional& weight, const Tensor& like) const {
    if (weight) check_matrix(*weight, mask, "weight");
    const Tensor out = scratch<T>(like, mask.rows, mask.columns);
    const Tensor dense = weight ? as_dense(as_type(*weight, dtype_of<T>())) : out;
    add_to(weight ? read<T>(dense) : nullptr, write<T>(out));
    return out;
  }

  const Mask& mask;
  const T scale;

 private:
  // All values times the scale, [nnz].
  Buffer<T> scaled_values() const {
    Buffer<T> all(mask.count());
    torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* out = all.get() + mask.offsets[n];
        const T* in = row(n, out);
        for (int64_t i = 0; i < mask.count(n); ++i) out[i] = scale * in[i];
      }
    });
    return all;
  }

  const Factors<T>* factors_ = nullptr;
  const T* a_padded_ = nullptr;  // A [r, 32 * width]
  const T* values_ = nullptr;
  Buffer<T> own_;
};

// Values given directly; their number must be the mask's.
inline Tensor checked_values(const Tensor& values, const Mask& mask, ScalarType dtype) {
  STD_TORCH_CHECK(values.numel() == mask.count(), "values has ", values.numel(), " elements, but the mask has ",
                  mask.count(), " set bits");
  return as_dense(as_type(values, dtype));
}

}  // namespace fade
