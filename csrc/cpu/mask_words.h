// A packed mask as the CPU kernels take it from outside: sizes checked and padding cleared in one place, so that no loop
// that counts or walks its bits can leave the weight, whatever the words are. Layout: common/bitmask.h.
#pragma once

#include "common/bitmask.h"
#include "cpu/kernel.h"

namespace fade {

// The words of a mask of `rows` x `columns`, contiguous and without padding bits: the tensor itself where it is so, which
// costs a look at each row's last word, and nothing where the columns fill whole words.
inline Tensor valid_words(const Tensor& words, int64_t rows, int64_t columns) {
  const int64_t width = words_per_row(columns);
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.dim() == 2, "mask words must be int32 [N, ceil(K/32)]");
  STD_TORCH_CHECK(words.size(0) == rows, "the mask has ", words.size(0), " rows, the weight ", rows);
  STD_TORCH_CHECK(words.size(1) == width, "mask words [", rows, ", ", words.size(1), "] do not fit ", columns,
                  " columns");
  const Tensor dense = as_dense(words);
  if (columns % kWordBits == 0) return dense;
  const uint32_t valid = column_bits(width - 1, columns);
  const auto* given = read<uint32_t>(dense);
  uint32_t any = 0;
  for (int64_t n = 0; n < rows; ++n) any |= given[n * width + width - 1];
  if ((any & ~valid) == 0) return dense;
  const Tensor cleared = torch::stable::clone(dense);
  auto* own = write<uint32_t>(cleared);
  for (int64_t n = 0; n < rows; ++n) own[n * width + width - 1] &= valid;
  return cleared;
}

}  // namespace fade
