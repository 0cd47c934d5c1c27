// Packed masks on CUDA: pack by warp ballot, unpack, count, tile occupancy, and the bit-exact copy of the values under
// a mask out of and into a weight. Definitions: fade_kernels/reference.py; layout: common/bitmask.h.
#include "common/bitmask.h"

#include "cuda/kernel.h"

namespace fade {
namespace {

// Consecutive words of one warp: one 64-bit division for all of them.
constexpr int64_t kWarpWords = 32;

int64_t blocks_for(int64_t warps) { return std::min(kMaxBlocks, (warps + kWarps - 1) / kWarps); }

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

__device__ __forceinline__ int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
}

__device__ __forceinline__ int64_t warp_count() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// A warp forms a word: each lane looks at one column.
__global__ void __launch_bounds__(kThreads)
    pack(const uint8_t* mask, uint32_t* words, int64_t count, int64_t columns, int64_t width) {
  const int lane = lane_index();
  for (int64_t begin = warp_index() * kWarpWords; begin < count; begin += warp_count() * kWarpWords) {
    const int64_t end = min(begin + kWarpWords, count);
    WordCursor at(begin, width);
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i, at.next()) {
      const int64_t column = at.word * kWordBits + lane;
      const bool bit = column < columns && mask[at.row * columns + column] != 0;
      const uint32_t word = __ballot_sync(kAllLanes, bit);
      if (lane == 0) words[i] = word;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack(const uint32_t* words, uint8_t* mask, int64_t count, int64_t columns, int64_t width) {
  const int lane = lane_index();
  for (int64_t begin = warp_index() * kWarpWords; begin < count; begin += warp_count() * kWarpWords) {
    const int64_t end = min(begin + kWarpWords, count);
    WordCursor at(begin, width);
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i, at.next()) {
      const int64_t column = at.word * kWordBits + lane;
      if (column < columns) mask[at.row * columns + column] = (words[i] >> lane) & 1u;
    }
  }
}

// A warp per row.
__global__ void __launch_bounds__(kThreads)
    count_rows(const uint32_t* words, int64_t* counts, int64_t rows, int64_t columns, int64_t width) {
  for (int64_t row = warp_index(); row < rows; row += warp_count()) {
    int64_t count = 0;
    for (int64_t w = lane_index(); w < width; w += kWarpSize) {
      count += __popc(words[row * width + w] & column_bits(w, columns));
    }
    count = warp_sum(count);
    if (lane_index() == 0) counts[row] = count;
  }
}

// A warp per tile: its lanes share the words that the tile's rows overlap, bits of other tiles masked off.
__global__ void __launch_bounds__(kThreads)
    occupancy(const uint32_t* words, uint8_t* occupied, int64_t rows, int64_t columns, int64_t width, int64_t tile_n,
              int64_t tile_k, int64_t tile_rows, int64_t tile_columns) {
  for (int64_t tile = warp_index(); tile < tile_rows * tile_columns; tile += warp_count()) {
    const int64_t i = tile / tile_columns, j = tile - i * tile_columns;
    const int64_t first_row = i * tile_n, height = min(tile_n, rows - first_row);
    const int64_t first = j * tile_k, last = first + min(tile_k, columns - first);
    const int64_t first_word = first / kWordBits, span = words_per_row(last) - first_word;
    bool any = false;
    for (int64_t at = lane_index(); at < height * span; at += kWarpSize) {
      const int64_t row = at / span, word = first_word + at - row * span;
      const int64_t low = max(int64_t{0}, first - word * kWordBits);
      const int64_t high = min(kWordBits, last - word * kWordBits);
      any |= (words[(first_row + row) * width + word] & bit_range(low, high)) != 0;
    }
    const uint32_t lanes = __ballot_sync(kAllLanes, any);
    if (lane_index() == 0) occupied[tile] = lanes != 0;
  }
}

constexpr int kScanThreads = 1024;

// counts[n] of `rows` rows become the sums of those before; counts[rows] the sum of all. One block: every thread sums a
// range of rows, the block scans the sums, every thread fills in its range.
__global__ void __launch_bounds__(kScanThreads) scan_rows(int64_t* counts, int64_t rows) {
  const int64_t share = (rows + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min(rows, threadIdx.x * share), end = min(rows, begin + share);
  int64_t sum = 0;
  for (int64_t n = begin; n < end; ++n) sum += counts[n];
  int64_t before = block_exclusive_scan(sum);
  if (threadIdx.x == kScanThreads - 1) counts[rows] = before + sum;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t count = counts[n];
    counts[n] = before;
    before += count;
  }
}

// A warp per row. Lanes first take a word each and scan their bit counts, then the warp walks the words with any bit, a
// column per lane. values[i] and the weight's element at the mask's i-th position are copied one way or the other.
//
// That the mask has `count` bits is the caller's word, as BitMask keeps it: to check it here would be to wait for the
// device. A wrong count stays harmless: no memory beyond is touched, values that the mask has no bits for become 0.
template <typename T, bool gather>
__global__ void __launch_bounds__(kThreads)
    copy_masked(T* weight, T* values, const uint32_t* words, const int64_t* offsets, int64_t rows, int64_t columns,
                int64_t width, int64_t count) {
  const int lane = lane_index();
  const uint32_t lower_lanes = (1u << lane) - 1u;
  if constexpr (gather) {
    const int64_t threads = warp_count() * kWarpSize;
    for (int64_t i = offsets[rows] + warp_index() * kWarpSize + lane; i < count; i += threads) values[i] = 0;
  }
  for (int64_t row = warp_index(); row < rows; row += warp_count()) {
    T* p_row = weight + row * columns;
    int64_t offset = offsets[row];
    for (int64_t first = 0; first < width; first += kWarpSize) {
      const int64_t w = first + lane;
      const uint32_t own = w < width ? words[row * width + w] & column_bits(w, columns) : 0u;
      const int bits = __popc(own);
      const int through = warp_inclusive_scan(bits);
      for (uint32_t rest = __ballot_sync(kAllLanes, own != 0); rest != 0; rest &= rest - 1) {
        const int source = __ffs(rest) - 1;
        const uint32_t word = __shfl_sync(kAllLanes, own, source);
        const int64_t i = offset + __shfl_sync(kAllLanes, through - bits, source) + __popc(word & lower_lanes);
        const int64_t column = (first + source) * kWordBits + lane;
        if (((word >> lane) & 1u) != 0 && i < count) {
          if constexpr (gather) {
            values[i] = p_row[column];
          } else {
            p_row[column] = values[i];
          }
        }
      }
      offset += __shfl_sync(kAllLanes, through, kWarpSize - 1);
    }
  }
}

void check_words(const Tensor& words, int64_t columns) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.dim() == 2,
                  "mask_words must be int32 [N, ceil(K/32)]");
  STD_TORCH_CHECK(words.size(1) == words_per_row(columns), "mask_words do not fit the number of columns");
}

Tensor pack_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2, "mask must be bool [N, K]");
  const Device device(mask);
  const Tensor dense = as_dense(mask);
  const int64_t rows = mask.size(0), columns = mask.size(1), width = words_per_row(columns);
  Tensor words = torch::stable::new_empty(mask, {rows, width}, ScalarType::Int);
  const int64_t count = rows * width;
  device.launch("pack_mask", pack, blocks_for((count + kWarpWords - 1) / kWarpWords), kThreads, read<uint8_t>(dense),
                write<uint32_t>(words), count, columns, width);
  return words;
}

Tensor unpack_mask(const Tensor& mask_words, int64_t columns) {
  check_words(mask_words, columns);
  const Device device(mask_words);
  const Tensor dense = as_dense(mask_words);
  const int64_t rows = mask_words.size(0), width = mask_words.size(1), count = rows * width;
  Tensor mask = torch::stable::new_empty(mask_words, {rows, columns}, ScalarType::Bool);
  device.launch("unpack_mask", unpack, blocks_for((count + kWarpWords - 1) / kWarpWords), kThreads,
                read<uint32_t>(dense), write<uint8_t>(mask), count, columns, width);
  return mask;
}

void launch_count_rows(const Device& device, const Tensor& dense_words, int64_t columns, int64_t* counts) {
  const int64_t rows = dense_words.size(0), width = dense_words.size(1);
  device.launch("mask_row_counts", count_rows, blocks_for(rows), kThreads, read<uint32_t>(dense_words), counts, rows,
                columns, width);
}

Tensor mask_row_counts(const Tensor& mask_words, int64_t columns) {
  check_words(mask_words, columns);
  const Device device(mask_words);
  Tensor counts = torch::stable::new_empty(mask_words, {mask_words.size(0)}, ScalarType::Long);
  launch_count_rows(device, as_dense(mask_words), columns, write<int64_t>(counts));
  return counts;
}

Tensor mask_occupancy(const Tensor& mask_words, int64_t columns, int64_t tile_n, int64_t tile_k) {
  check_words(mask_words, columns);
  STD_TORCH_CHECK(tile_n > 0 && tile_k > 0, "tile_n and tile_k must be positive");
  const Device device(mask_words);
  const Tensor dense = as_dense(mask_words);
  const int64_t rows = mask_words.size(0);
  const int64_t tile_rows = rows / tile_n + (rows % tile_n != 0);
  const int64_t tile_columns = columns / tile_k + (columns % tile_k != 0);
  Tensor occupied = torch::stable::new_empty(mask_words, {tile_rows, tile_columns}, ScalarType::Bool);
  device.launch("mask_occupancy", occupancy, blocks_for(tile_rows * tile_columns), kThreads, read<uint32_t>(dense),
                write<uint8_t>(occupied), rows, columns, mask_words.size(1), tile_n, tile_k, tile_rows, tile_columns);
  return occupied;
}

// weight and values must be contiguous; elements move as unsigned integers of their size, so that every dtype keeps its
// bits, NaN payloads included.
template <bool gather>
void launch_copy_masked(const Tensor& weight, const Tensor& values, const Tensor& mask_words) {
  STD_TORCH_CHECK(weight.dim() >= 2, "weight must have at least two dimensions");
  const int64_t rows = weight.size(0), columns = flat_columns(weight), count = values.numel();
  check_words(mask_words, columns);
  STD_TORCH_CHECK(mask_words.size(0) == rows, "mask_words do not have the weight's rows");
  STD_TORCH_CHECK(same_cuda_device(mask_words, weight), "mask_words and weight are not on one CUDA device");
  STD_TORCH_CHECK(same_cuda_device(values, weight), "values and weight are not on one CUDA device");
  const Device device(weight);
  const Tensor words = as_dense(mask_words);
  const Tensor offsets = torch::stable::new_empty(mask_words, {rows + 1}, ScalarType::Long);
  launch_count_rows(device, words, columns, write<int64_t>(offsets));
  device.launch("row offsets of a mask", scan_rows, 1, kScanThreads, write<int64_t>(offsets), rows);

  const auto copy = [&](auto element) {
    using T = decltype(element);
    const char* name = gather ? "gather_masked" : "scatter_masked_";
    device.launch(name, copy_masked<T, gather>, blocks_for(std::max(rows, int64_t{1})), kThreads,
                  static_cast<T*>(weight.data_ptr()), static_cast<T*>(values.data_ptr()), read<uint32_t>(words),
                  read<int64_t>(offsets), rows, columns, words_per_row(columns), count);
  };
  switch (weight.element_size()) {
    case 1: return copy(uint8_t{});
    case 2: return copy(uint16_t{});
    case 4: return copy(uint32_t{});
    case 8: return copy(uint64_t{});
    default: STD_TORCH_CHECK(false, "elements of ", weight.element_size(), " bytes are not supported");
  }
}

Tensor gather_masked(const Tensor& weight, const Tensor& mask_words, int64_t count) {
  STD_TORCH_CHECK(count >= 0, "count must be the number of set bits, not ", count);
  const Device device(weight);
  Tensor values = torch::stable::new_empty(weight, {count});
  launch_copy_masked<true>(as_dense(weight), values, mask_words);
  return values;
}

void scatter_masked_(Tensor weight, const Tensor& values, const Tensor& mask_words) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == weight.scalar_type(),
                  "values must be one-dimensional, of the weight's dtype");
  const Device device(weight);
  InPlace target(weight);
  launch_copy_masked<false>(target.dense(), as_dense(values), mask_words);
  target.store();
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CUDA, m) {
  m.impl("pack_mask", TORCH_BOX(&fade::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&fade::unpack_mask));
  m.impl("mask_row_counts", TORCH_BOX(&fade::mask_row_counts));
  m.impl("mask_occupancy", TORCH_BOX(&fade::mask_occupancy));
  m.impl("gather_masked", TORCH_BOX(&fade::gather_masked));
  m.impl("scatter_masked_", TORCH_BOX(&fade::scatter_masked_));
}
