// Packed masks on the CPU: pack, unpack, count, tile occupancy, and the bit-exact copy of the values under a mask out of
// and into a weight. Definitions: fade_kernels/reference.py; layout: common/bitmask.h.
#include "common/bitmask.h"

#include <algorithm>
#include <bit>

#include "cpu/kernel.h"
#include "cpu/mask_words.h"

namespace fade {
namespace {

FADE_CPU_CLONES void pack_row(const uint8_t* row, uint32_t* words, int64_t columns) {
  const int64_t whole = columns / kWordBits;
  for (int64_t w = 0; w < whole; ++w) {
    uint32_t word = 0;
    for (int64_t j = 0; j < kWordBits; ++j) word |= static_cast<uint32_t>(row[w * kWordBits + j] != 0) << j;
    words[w] = word;
  }
  if (whole * kWordBits < columns) {
    uint32_t word = 0;
    for (int64_t k = whole * kWordBits; k < columns; ++k) {
      word |= static_cast<uint32_t>(row[k] != 0) << (k - whole * kWordBits);
    }
    words[whole] = word;
  }
}

FADE_CPU_CLONES void unpack_row(const uint32_t* words, uint8_t* row, int64_t columns) {
  const int64_t whole = columns / kWordBits;
  for (int64_t w = 0; w < whole; ++w) {
    const uint32_t word = words[w];
    for (int64_t j = 0; j < kWordBits; ++j) row[w * kWordBits + j] = (word >> j) & 1u;
  }
  for (int64_t k = whole * kWordBits; k < columns; ++k) row[k] = mask_bit(words, k);
}

FADE_CPU_CLONES int64_t count_words(const uint32_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t w = 0; w < n; ++w) count += std::popcount(words[w]);
  return count;
}

int64_t rows_grain(int64_t columns) { return std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, columns)); }

Tensor pack_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2, "mask must be bool [N, K]");
  const Tensor dense = as_dense(mask);
  const int64_t rows = mask.size(0), columns = mask.size(1), width = words_per_row(columns);
  Tensor words = torch::stable::new_empty(mask, {rows, width}, ScalarType::Int);
  const auto* source = read<uint8_t>(dense);
  auto* target = write<uint32_t>(words);
  torch::stable::parallel_for(0, rows, rows_grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pack_row(source + n * columns, target + n * width, columns);
  });
  return words;
}

Tensor unpack_mask(const Tensor& mask_words, int64_t columns) {
  const int64_t rows = mask_words.size(0), width = words_per_row(columns);
  const Tensor dense = valid_words(mask_words, rows, columns);
  Tensor mask = torch::stable::new_empty(mask_words, {rows, columns}, ScalarType::Bool);
  const auto* source = read<uint32_t>(dense);
  auto* target = write<uint8_t>(mask);
  torch::stable::parallel_for(0, rows, rows_grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) unpack_row(source + n * width, target + n * columns, columns);
  });
  return mask;
}

Tensor mask_row_counts(const Tensor& mask_words, int64_t columns) {
  const int64_t rows = mask_words.size(0), width = words_per_row(columns);
  const Tensor dense = valid_words(mask_words, rows, columns);
  Tensor counts = torch::stable::new_empty(mask_words, {rows}, ScalarType::Long);
  const auto* source = read<uint32_t>(dense);
  auto* target = write<int64_t>(counts);
  torch::stable::parallel_for(0, rows, rows_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) target[n] = count_words(source + n * width, width);
  });
  return counts;
}

Tensor mask_occupancy(const Tensor& mask_words, int64_t columns, int64_t tile_n, int64_t tile_k) {
  STD_TORCH_CHECK(tile_n > 0 && tile_k > 0, "tile sizes must be positive");
  const int64_t rows = mask_words.size(0), width = words_per_row(columns);
  const Tensor dense = valid_words(mask_words, rows, columns);
  const int64_t tile_rows = (rows + tile_n - 1) / tile_n, tile_columns = (columns + tile_k - 1) / tile_k;
  Tensor occupancy = torch::stable::new_empty(mask_words, {tile_rows, tile_columns}, ScalarType::Bool);
  const auto* source = read<uint32_t>(dense);
  auto* target = write<uint8_t>(occupancy);
  torch::stable::parallel_for(0, tile_rows, rows_grain(width * tile_n), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> any(width);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(any.begin(), any.end(), 0u);
      for (int64_t n = i * tile_n; n < std::min(rows, (i + 1) * tile_n); ++n) {
        for (int64_t w = 0; w < width; ++w) any[w] |= source[n * width + w];
      }
      for (int64_t j = 0; j < tile_columns; ++j) {
        const int64_t first = j * tile_k, last = std::min(columns, first + tile_k);
        uint32_t bits = 0;
        for (int64_t w = first / kWordBits; w * kWordBits < last; ++w) {
          const int64_t low = std::max<int64_t>(0, first - w * kWordBits);
          const int64_t high = std::min<int64_t>(kWordBits, last - w * kWordBits);
          bits |= any[w] & bit_range(low, high);
        }
        target[i * tile_columns + j] = bits != 0;
      }
    }
  });
  return occupancy;
}

// offsets[n] = number of set bits in the rows before n; offsets[rows] = all of them.
std::vector<int64_t> row_offsets(const Tensor& dense_words) {
  const int64_t rows = dense_words.size(0), width = dense_words.size(1);
  const auto* words = read<uint32_t>(dense_words);
  std::vector<int64_t> offsets(rows + 1, 0);
  torch::stable::parallel_for(0, rows, rows_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) offsets[n + 1] = count_words(words + n * width, width);
  });
  for (int64_t n = 0; n < rows; ++n) offsets[n + 1] += offsets[n];
  return offsets;
}

// Calls visit(column, i) for the i-th set bit of a row.
template <typename Visit>
inline void for_each_bit(const uint32_t* words, int64_t width, Visit visit) {
  int64_t i = 0;
  for (int64_t w = 0; w < width; ++w) {
    for (uint32_t word = words[w]; word != 0; word &= word - 1) visit(w * kWordBits + std::countr_zero(word), i++);
  }
}

// Values move as unsigned integers of the element's size, so every dtype keeps its bits, NaN payloads included.
template <typename Call>
void with_element(size_t bytes, Call call) {
  switch (bytes) {
    case 1: return call(uint8_t{});
    case 2: return call(uint16_t{});
    case 4: return call(uint32_t{});
    case 8: return call(uint64_t{});
    default: STD_TORCH_CHECK(false, "elements of ", bytes, " bytes are not supported");
  }
}

struct MaskedCopy {
  int64_t rows, columns, width;
  Tensor words;
  std::vector<int64_t> offsets;
};

MaskedCopy masked_copy(const Tensor& weight, const Tensor& mask_words, int64_t count) {
  STD_TORCH_CHECK(weight.dim() >= 2, "weight must have at least two dimensions");
  const int64_t rows = weight.size(0), columns = flat_columns(weight);
  const Tensor words = valid_words(mask_words, rows, columns);
  MaskedCopy copy{rows, columns, words_per_row(columns), words, row_offsets(words)};
  STD_TORCH_CHECK(copy.offsets.back() == count, "the mask has ", copy.offsets.back(), " set bits, not ", count);
  return copy;
}

Tensor gather_masked(const Tensor& weight, const Tensor& mask_words, int64_t count) {
  const MaskedCopy copy = masked_copy(weight, mask_words, count);
  const Tensor dense = as_dense(weight);
  Tensor values = torch::stable::new_empty(weight, {count});
  with_element(weight.element_size(), [&](auto element) {
    using T = decltype(element);
    const auto* source = read<T>(dense);
    const auto* words = read<uint32_t>(copy.words);
    auto* target = write<T>(values);
    torch::stable::parallel_for(0, copy.rows, rows_grain(copy.columns), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* row = source + n * copy.columns;
        T* out = target + copy.offsets[n];
        for_each_bit(words + n * copy.width, copy.width, [&](int64_t k, int64_t i) { out[i] = row[k]; });
      }
    });
  });
  return values;
}

void scatter_masked_(Tensor weight, const Tensor& values, const Tensor& mask_words) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == weight.scalar_type(),
                  "values must be one-dimensional, of the weight's dtype");
  const MaskedCopy copy = masked_copy(weight, mask_words, values.numel());
  const Tensor dense_values = as_dense(values);
  InPlace target(weight);
  with_element(weight.element_size(), [&](auto element) {
    using T = decltype(element);
    const auto* source = read<T>(dense_values);
    const auto* words = read<uint32_t>(copy.words);
    auto* out = write<T>(target.dense());
    torch::stable::parallel_for(0, copy.rows, rows_grain(copy.columns), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* row = out + n * copy.columns;
        const T* in = source + copy.offsets[n];
        for_each_bit(words + n * copy.width, copy.width, [&](int64_t k, int64_t i) { row[k] = in[i]; });
      }
    });
  });
  target.store();
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&fade::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&fade::unpack_mask));
  m.impl("mask_row_counts", TORCH_BOX(&fade::mask_row_counts));
  m.impl("mask_occupancy", TORCH_BOX(&fade::mask_occupancy));
  m.impl("gather_masked", TORCH_BOX(&fade::gather_masked));
  m.impl("scatter_masked_", TORCH_BOX(&fade::scatter_masked_));
}
