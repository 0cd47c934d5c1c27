// The path for very sparse masks (about 1 %) on CUDA: work by set position, not by tile. Definitions:
// fade_kernels/reference.py; the positions: fade_kernels/positions.py.
//
// Delta has values v at the mask's positions (n_j, k_j): v_j = <B[n_j], A[:, k_j]>, or values learnt directly.
//
//   y  += s x Delta^T      y[t, n]  += s sum over j in row n of v_j x[t, k_j]
//   dx += s dy Delta       dx[t, k] += s sum over j in column k of v_j dy[t, n_j]
//   g_j  = sum over t of dy[t, n_j] x[t, k_j]                     the weight's gradient at the positions alone
//   dB[n] = s sum over j in row n of g_j A[:, k_j],               dA[:, k] = s sum over j in column k of g_j B[n_j]
//
// Columns of x are read at random, 2 bytes out of every 32 that memory would deliver. So a block brings a slab of whole
// rows of x into shared memory once, transposed: the lanes of a warp then look at one column of it, each at its own
// rows, in different banks. A slab of 16-bit elements holds two rows in a word. kLanes of a warp share a column: 32
// where the slab of 64 rows fits, or 16 or 8, and the warp then works on 2 or 4 positions at a time.
//
// Device memory, in units of one activation of a square layer (2 T N bytes; the frozen layer's forward and input
// gradient move 4): x, y read and written, 3; dy, dx likewise, 3; x and dy for g, 2.
//
// No atomics: every sum has one owner and a fixed order.
#include "common/dtype.h"
#include "cuda/kernel.h"

#include <optional>
#include <tuple>

namespace fade {
namespace {

constexpr int kAccess = 16;  // bytes
// Outputs that leave a slab together: of a row of y in 16 bits 64 bytes, two sectors.
constexpr int kTile = 32;
// Blocks that share a multiprocessor: one computes while the other waits for its slab.
constexpr int kResident = 2;

// A position as the product walks it: where its operand stands in the slab, and its value.
struct alignas(8) Entry {
  int32_t index;
  float value;
};

// The mask's positions by row (CSR) or by column (CSC).
struct Segments {
  const int32_t* starts;   // [segments + 1]
  const int32_t* index;    // [positions] column of each position (CSR), or row (CSC)
  const int32_t* segment;  // [positions] its segment
};

// A scale on the device is read there, so that it can change inside a captured graph; one on the host is passed along.
struct Scale {
  const float* pointer;
  float value;
  __device__ float get() const { return pointer != nullptr ? *pointer : value; }
};

// Rows of elements that lie side by side, `stride` elements from row to row.
template <typename T>
struct Rows {
  const T* data;
  int64_t rows, stride;
  bool aligned;  // every row starts at a multiple of kAccess bytes
};

template <typename T>
constexpr int kRowsPerWord = sizeof(uint32_t) / sizeof(T);

template <typename T, int kLanes>
constexpr int kSlab = kLanes * kRowsPerWord<T>;  // rows

__device__ __forceinline__ uint32_t word_of(const float (&rows)[1]) { return bit_cast<uint32_t>(rows[0]); }

template <typename T>
__device__ __forceinline__ uint32_t word_of(const T (&rows)[2]) {
  return rows[0].bits | static_cast<uint32_t>(rows[1].bits) << 16;
}

// The row `i` of a word.
template <typename T>
__device__ __forceinline__ float row_of(uint32_t word, int i) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return bit_cast<float>(word);
  } else {
    return to_float(T{static_cast<uint16_t>(i == 0 ? word : word >> 16)});
  }
}

__device__ __forceinline__ void round_to(float value, float& out) { out = value; }
__device__ __forceinline__ void round_to(float value, Half& out) { out = to_half(value); }
__device__ __forceinline__ void round_to(float value, BFloat16& out) { out = to_bfloat16(value); }

// Words [columns][kLanes + 1] of a slab: word (k, l) holds its rows l and l + kLanes in column first_column + k; rows
// beyond the last are 0. The odd pitch spreads a column's lanes, and the words a warp writes here, over the banks.
template <typename T, int kLanes>
__device__ __forceinline__ void stage(uint32_t* words, const Rows<T>& x, int64_t first_row, int64_t first_column,
                                      int columns) {
  constexpr int kVector = kAccess / sizeof(T);
  constexpr int kRowLanes = 8, kColumnLanes = kWarpSize / kRowLanes, kStrip = kColumnLanes * kVector;
  constexpr int kRowGroups = kLanes / kRowLanes;
  const int lane = threadIdx.x % kWarpSize;
  const int units = (columns + kStrip - 1) / kStrip * kRowGroups;
#pragma unroll 2
  for (int unit = threadIdx.x / kWarpSize; unit < units; unit += kWarps) {
    const int l = unit % kRowGroups * kRowLanes + lane % kRowLanes;
    const int k = unit / kRowGroups * kStrip + lane / kRowLanes * kVector;
    T loaded[kRowsPerWord<T>][kVector] = {};
#pragma unroll
    for (int i = 0; i < kRowsPerWord<T>; ++i) {
      const int64_t row = first_row + l + i * kLanes;
      if (row >= x.rows) continue;
      const T* from = x.data + row * x.stride + first_column + k;
      if (x.aligned && k + kVector <= columns) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        memcpy(loaded[i], &raw, kAccess);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (k + j < columns) loaded[i][j] = from[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      T rows[kRowsPerWord<T>];
#pragma unroll
      for (int i = 0; i < kRowsPerWord<T>; ++i) rows[i] = loaded[i][j];
      if (k + j < columns) words[(k + j) * (kLanes + 1) + l] = word_of(rows);
    }
  }
}

// --- values of the delta ---------------------------------------------------------------------------------------------

// v_j = <B[n_j], A[:, k_j]>, a thread per position.
template <typename F>
__global__ void __launch_bounds__(kThreads)
    lora_entries(Entry* entries, const F* lora_a, const F* lora_b, Segments at, bool by_column, int64_t positions,
                 int64_t columns, int rank) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= positions) return;
  const int32_t index = at.index[j], segment = at.segment[j];
  const int64_t row = by_column ? index : segment, column = by_column ? segment : index;
  float sum = 0.0f;
#pragma unroll 4
  for (int r = 0; r < rank; ++r) sum += to_float(lora_b[row * rank + r]) * to_float(lora_a[r * columns + column]);
  entries[j] = Entry{index, sum};
}

// Learnt values, which are in row-major order: order[j] is the place of position j there; null: j.
template <typename V>
__global__ void __launch_bounds__(kThreads)
    value_entries(Entry* entries, const V* values, const int32_t* index, const int32_t* order, int64_t positions) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j < positions) entries[j] = Entry{index[j], to_float(values[order == nullptr ? j : order[j]])};
}

// --- y += s x Delta^T ------------------------------------------------------------------------------------------------

template <typename T, int kLanes>
constexpr int64_t kTileWords = kTile * (kSlab<T, kLanes> + 1);

// A block takes a slab of x and one of `ranges` ranges of the segments: y[t, i] += s sum over j in segment i of
// value_j x[t, index_j], summed in fp32 and rounded once. y has x's type, or fp32: then nothing is rounded here.
template <typename T, typename Y, int kLanes>
__global__ void __launch_bounds__(kThreads, kResident)
    add_product(Y* y, const Rows<T> x, const int32_t* starts, const Entry* __restrict__ entries, Scale scale,
                int64_t segments, int columns, int64_t ranges, int64_t range) {
  constexpr int kPitch = kLanes + 1, kRows = kSlab<T, kLanes>, kTilePitch = kRows + 1;
  constexpr int kSegmentsAtOnce = kThreads / kLanes;
  extern __shared__ uint32_t shared[];
  const uint32_t* words = shared;                                                // [columns][kPitch]
  float* tiles = reinterpret_cast<float*>(shared + columns * kPitch);            // two of [kTile][kTilePitch]
  const int64_t first_row = blockIdx.x / ranges * kRows;
  const int64_t begin = blockIdx.x % ranges * range, end = min(begin + range, segments);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int l = threadIdx.x % kLanes;
  if (starts[begin] == starts[end]) return;

  stage<T, kLanes>(shared, x, first_row, 0, columns);
  __syncthreads();
  const float s = scale.get();
  int which = 0;
  for (int64_t first = begin; first < end; first += kTile) {
    const int count = static_cast<int>(min(end - first, static_cast<int64_t>(kTile)));
    if (starts[first] == starts[first + count]) continue;
    float* tile = tiles + which * kTileWords<T, kLanes>;
    for (int i = threadIdx.x / kLanes; i < count; i += kSegmentsAtOnce) {
      const int last = starts[first + i + 1];
      float sums[kRowsPerWord<T>] = {};
#pragma unroll 4
      for (int j = starts[first + i]; j < last; ++j) {
        const Entry entry = entries[j];
        const uint32_t word = words[entry.index * kPitch + l];
#pragma unroll
        for (int h = 0; h < kRowsPerWord<T>; ++h) sums[h] += entry.value * row_of<T>(word, h);
      }
#pragma unroll
      for (int h = 0; h < kRowsPerWord<T>; ++h) tile[i * kTilePitch + l + h * kLanes] = sums[h];
    }
    __syncthreads();
    // Two tiles take turns: the barrier of the next one comes before this one is written again.
    if (lane < count) {
#pragma unroll 4
      for (int t = warp; t < kRows; t += kWarps) {
        if (first_row + t >= x.rows) break;
        Y& out = y[(first_row + t) * segments + first + lane];
        round_to(to_float(out) + s * tile[lane * kTilePitch + t], out);
      }
    }
    which ^= 1;
  }
}

// --- g = (dY^T X) at the positions -----------------------------------------------------------------------------------

// Lane l of kCount lanes, each of which has kCount parts, gets the sum of everybody's part l: lanes exchange halves of
// what they have, sum, and are left with half as many, kCount - 1 exchanges in all.
template <int kCount>
__device__ __forceinline__ float sum_of_own(const float (&parts)[kCount], int l) {
  if constexpr (kCount == 1) {
    return parts[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (l & kHalf) != 0;
    float sums[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? parts[i] : parts[i + kHalf];
      sums[i] = (upper ? parts[i + kHalf] : parts[i]) + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return sum_of_own(sums, l);
  }
}

// A block takes a range of T, slab by slab, and a range of the mask's rows with all their positions. A warp forms the
// products of 32 positions, each lane over its own rows of the slab, and sums them up lane by lane.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, kResident)
    sample_products(float* partial, const Rows<T> dy, const Rows<T> x, Segments at, int64_t positions, int64_t rows,
                    int columns, int64_t row_ranges, int64_t row_range, int64_t slabs) {
  constexpr int kPitch = kLanes + 1, kRows = kSlab<T, kLanes>;
  extern __shared__ uint32_t shared[];
  const uint32_t* x_words = shared;                      // [columns][kPitch]
  const uint32_t* dy_words = shared + columns * kPitch;  // [row_range][kPitch]
  const int64_t first = blockIdx.x % row_ranges * row_range, count = min(row_range, rows - first);
  const int64_t first_slab = blockIdx.x / row_ranges * slabs;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int l = lane % kLanes, group = lane - l;
  const int64_t begin = at.starts[first], end = at.starts[first + count];
  float* out = partial + blockIdx.x / row_ranges * positions;

  for (int64_t slab = first_slab; slab < first_slab + slabs; ++slab) {
    if (slab != first_slab && slab * kRows >= x.rows) break;
    __syncthreads();
    stage<T, kLanes>(shared, x, slab * kRows, 0, columns);
    stage<T, kLanes>(shared + columns * kPitch, dy, slab * kRows, first, static_cast<int>(count));
    __syncthreads();
    for (int64_t block = begin + warp * kWarpSize; block < end; block += kThreads) {
      const int64_t own = block + lane;
      // Column and row in one word, one exchange for both: shared memory holds far fewer than 2^16 of either.
      const uint32_t place = own < end ? at.index[own] << 16 | (at.segment[own] - static_cast<int>(first)) : 0;
      float sums[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t of_group = __shfl_sync(kAllLanes, place, group + i);
        const uint32_t x_word = x_words[(of_group >> 16) * kPitch + l];
        const uint32_t dy_word = dy_words[(of_group & 0xFFFFu) * kPitch + l];
        sums[i] = row_of<T>(dy_word, 0) * row_of<T>(x_word, 0);
        if constexpr (kRowsPerWord<T> == 2) sums[i] += row_of<T>(dy_word, 1) * row_of<T>(x_word, 1);
      }
      const float sum = sum_of_own(sums, l);
      if (own < end) out[own] = slab == first_slab ? sum : out[own] + sum;
    }
  }
}

// The sum of every range's part, in their order.
__global__ void __launch_bounds__(kThreads)
    sum_ranges(float* out, const float* partial, int64_t positions, int64_t ranges) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= positions) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t range = 0; range < ranges; ++range) sum += partial[range * positions + j];
  out[j] = sum;
}

// --- dA, dB from g ---------------------------------------------------------------------------------------------------

// A warp per row of dB, then per column of dA; a lane per rank.
template <typename F>
__global__ void __launch_bounds__(kThreads)
    contract(F* grad_a, F* grad_b, const float* gradient, Segments by_row, Segments by_column, const int32_t* order,
             const F* lora_a, const F* lora_b, Scale scale, int64_t rows, int64_t columns, int rank) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (warp >= rows + columns) return;
  const float s = scale.get();
  for (int r = threadIdx.x % kWarpSize; r < rank; r += kWarpSize) {
    float sum = 0.0f;
    if (warp < rows) {
#pragma unroll 4
      for (int j = by_row.starts[warp]; j < by_row.starts[warp + 1]; ++j) {
        sum += gradient[j] * to_float(lora_a[r * columns + by_row.index[j]]);
      }
      round_to(s * sum, grad_b[warp * rank + r]);
    } else {
      const int64_t column = warp - rows;
#pragma unroll 4
      for (int j = by_column.starts[column]; j < by_column.starts[column + 1]; ++j) {
        sum += gradient[order[j]] * to_float(lora_b[static_cast<int64_t>(by_column.index[j]) * rank + r]);
      }
      round_to(s * sum, grad_a[r * columns + column]);
    }
  }
}

// --- host ------------------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls `run` with an element of the tensor's type.
template <typename Run>
void with_type(const Tensor& tensor, const char* name, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(same_cuda_device(tensor, like), name, " is not on the CUDA device of the other tensors");
}

const int32_t* read_positions(const Tensor& positions, const Tensor& like, int64_t size, const char* name) {
  check_device(positions, like, name);
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Int && positions.dim() == 1 && positions.is_contiguous() &&
                      positions.size(0) == size,
                  name, " must be contiguous int32 [", size, "]");
  return read<int32_t>(positions);
}

Segments read_segments(const Tensor& starts, const Tensor& index, const Tensor& segment, const Tensor& like,
                       int64_t segments) {
  return {read_positions(starts, like, segments + 1, "starts"),
          read_positions(index, like, index.numel(), "index"),
          read_positions(segment, like, index.numel(), "segment")};
}

Scale read_scale(const Tensor& scale, const Tensor& like) {
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.numel() == 1, "scale must be one float32 number");
  if (scale.is_cpu() && !like.is_cpu()) return {nullptr, *read<float>(scale)};
  check_device(scale, like, "scale");
  return {read<float>(scale), 0.0f};
}

// A matrix whose rows are as they are in memory; columns that are not side by side are copied into `kept`.
template <typename T>
Rows<T> read_rows(const Tensor& x, Tensor& kept) {
  kept = x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
  const T* data = read<T>(kept);
  const int64_t stride = kept.stride(0);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kAccess == 0 && stride * sizeof(T) % kAccess == 0;
  return {data, x.size(0), stride, aligned};
}

// What each of kResident blocks may take; the driver keeps 1 KiB a block.
int64_t share_of(int64_t shared_bytes) { return shared_bytes / kResident - 1024; }

// Calls `run` with the number of lanes that share a column: as many as let kResident blocks fit into shared memory and
// leave at least a slab for every fourth multiprocessor; `words(lanes)` is what a block needs.
template <typename T, typename Words, typename Run>
void with_lanes(const Device& device, int64_t tokens, int64_t columns, const Words& words, const Run& run) {
  const int64_t limit = device.shared_bytes(), processors = device.multiprocessors();
  const auto suits = [&](int64_t lanes) {
    const bool enough = 4 * divide_up(tokens, lanes * kRowsPerWord<T>) >= processors;
    return enough && static_cast<int64_t>(sizeof(uint32_t)) * words(lanes) <= share_of(limit);
  };
  if (suits(32)) return run(std::integral_constant<int, 32>{});
  if (suits(16)) return run(std::integral_constant<int, 16>{});
  STD_TORCH_CHECK(static_cast<int64_t>(sizeof(uint32_t)) * words(8) <= limit, "a slab of ", columns,
                  " columns does not fit into this GPU's shared memory: use another regime than gather");
  run(std::integral_constant<int, 8>{});
}

// y [T, segments] += s x Delta^T for x [T, columns].
void launch_product(const Device& device, const Tensor& y, const Tensor& x, const int32_t* starts, const Entry* entries,
                    Scale scale) {
  const int64_t tokens = x.size(0), columns = x.size(1), segments = y.size(1);
  with_type(x, "x", [&](auto element) {
    using T = decltype(element);
    Tensor kept = x;
    const Rows<T> rows = read_rows<T>(x, kept);
    const auto words = [&](int64_t lanes) {
      return columns * (lanes + 1) + 2 * kTile * (lanes * kRowsPerWord<T> + 1);
    };
    with_lanes<T>(device, tokens, columns, words, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const int64_t slabs = divide_up(tokens, kSlab<T, kLanes>);
      const int64_t wanted = divide_up(kResident * device.multiprocessors(), slabs);
      const int64_t range = kTile * divide_up(divide_up(segments, kTile), wanted);
      const int64_t ranges = divide_up(segments, range);
      const auto launch = [&](auto sum) {
        using Y = decltype(sum);
        device.launch_with_shared("gathered product", add_product<T, Y, kLanes>, slabs * ranges, kThreads,
                                  sizeof(uint32_t) * words(kLanes), write<Y>(y), rows, starts, entries, scale, segments,
                                  static_cast<int>(columns), ranges, range);
      };
      if (y.scalar_type() == ScalarType::Float) {
        launch(float{});
      } else {
        launch(element);
      }
    });
  });
}

void check_rows(const Tensor& y, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0), "x and y must be [T, *] with one T");
  check_device(x, y, "x");
}

void check_product(const Tensor& y, const Tensor& x) {
  check_rows(y, x);
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type() || y.scalar_type() == ScalarType::Float,
                  "y must have the dtype of x, or float32");
}

Tensor new_entries(const Tensor& index) {
  return torch::stable::new_empty(index, {index.numel(), static_cast<int64_t>(sizeof(Entry) / sizeof(int32_t))});
}

void add_gathered_lora_(Tensor y, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& starts,
                        const Tensor& index, const Tensor& segment, bool by_column, const Tensor& scale) {
  check_product(y, x);
  const int64_t rank = lora_a.size(0), columns = lora_a.size(1), rows = lora_b.size(0), positions = index.numel();
  STD_TORCH_CHECK(lora_b.size(1) == rank && lora_a.scalar_type() == lora_b.scalar_type(), "A and B do not fit");
  STD_TORCH_CHECK(y.size(1) == (by_column ? columns : rows) && x.size(1) == (by_column ? rows : columns),
                  "x and y do not fit A and B");
  check_device(lora_a, y, "lora_a");
  check_device(lora_b, y, "lora_b");
  if (y.numel() == 0 || positions == 0) return;
  const Device device(y);
  const Segments at = read_segments(starts, index, segment, y, y.size(1));
  const Tensor a = as_dense(lora_a), b = as_dense(lora_b), entries = new_entries(index);
  with_type(a, "A and B", [&](auto element) {
    using F = decltype(element);
    device.launch("values of a delta", lora_entries<F>, divide_up(positions, kThreads), kThreads, write<Entry>(entries),
                  read<F>(a), read<F>(b), at, by_column, positions, columns, static_cast<int>(rank));
  });
  InPlace target(y);
  launch_product(device, target.dense(), x, at.starts, read<Entry>(entries), read_scale(scale, y));
  target.store();
}

void add_gathered_values_(Tensor y, const Tensor& x, const Tensor& values, const std::optional<Tensor>& order,
                          const Tensor& starts, const Tensor& index, const Tensor& scale) {
  check_product(y, x);
  const int64_t positions = index.numel();
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == positions, "values must be [", positions, "]");
  check_device(values, y, "values");
  if (y.numel() == 0 || positions == 0) return;
  const Device device(y);
  const int32_t* p_starts = read_positions(starts, y, y.size(1) + 1, "starts");
  const int32_t* p_index = read_positions(index, y, positions, "index");
  const int32_t* p_order = order.has_value() ? read_positions(*order, y, positions, "order") : nullptr;
  const Tensor dense = as_dense(values), entries = new_entries(index);
  with_type(dense, "values", [&](auto element) {
    using V = decltype(element);
    device.launch("values of a delta", value_entries<V>, divide_up(positions, kThreads), kThreads,
                  write<Entry>(entries), read<V>(dense), p_index, p_order, positions);
  });
  InPlace target(y);
  launch_product(device, target.dense(), x, p_starts, read<Entry>(entries), read_scale(scale, y));
  target.store();
}

Tensor sampled_gradient(const Tensor& grad_output, const Tensor& x, const Tensor& starts, const Tensor& index,
                        const Tensor& segment) {
  check_rows(grad_output, x);
  STD_TORCH_CHECK(grad_output.scalar_type() == x.scalar_type(), "grad_output and x must have one dtype");
  const int64_t tokens = x.size(0), columns = x.size(1), rows = grad_output.size(1), positions = index.numel();
  const Device device(x);
  Tensor gradient = torch::stable::new_empty(x, {positions}, ScalarType::Float);
  if (positions == 0) return gradient;
  if (tokens == 0) {
    torch::stable::fill_(gradient, 0.0);
    return gradient;
  }
  const Segments at = read_segments(starts, index, segment, x, rows);
  with_type(x, "x", [&](auto element) {
    using T = decltype(element);
    Tensor kept_dy = x, kept_x = x;
    const Rows<T> dy_rows = read_rows<T>(grad_output, kept_dy), x_rows = read_rows<T>(x, kept_x);
    // Beside all columns of x, at least this many of dy.
    const int64_t least = std::min(rows, int64_t{256});
    const auto words = [&](int64_t lanes) { return (columns + least) * (lanes + 1); };
    with_lanes<T>(device, tokens, columns, words, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      constexpr int64_t kColumnBytes = sizeof(uint32_t) * (kLanes + 1);
      const int64_t wanted = kResident * device.multiprocessors();
      const int64_t slabs = divide_up(tokens, kSlab<T, kLanes>);
      const int64_t fitting = std::max(least, share_of(device.shared_bytes()) / kColumnBytes - columns);
      // Vectors of dy start at multiples of kTile columns.
      const int64_t even = kTile * divide_up(divide_up(rows, kTile), divide_up(wanted, slabs));
      const int64_t row_range = std::min({rows, even, std::max(int64_t{kTile}, fitting / kTile * kTile)});
      const int64_t row_ranges = divide_up(rows, row_range);
      const int64_t slabs_each = divide_up(slabs, std::min(slabs, divide_up(wanted, row_ranges)));
      const int64_t ranges = divide_up(slabs, slabs_each);
      Tensor partial = ranges == 1 ? gradient : torch::stable::new_empty(gradient, {ranges, positions});
      device.launch_with_shared("sampled gradient", sample_products<T, kLanes>, ranges * row_ranges, kThreads,
                                (columns + row_range) * kColumnBytes, write<float>(partial), dy_rows, x_rows, at,
                                positions, rows, static_cast<int>(columns), row_ranges, row_range, slabs_each);
      if (ranges > 1) {
        device.launch("sum of a sampled gradient", sum_ranges, divide_up(positions, kThreads), kThreads,
                      write<float>(gradient), read<float>(partial), positions, ranges);
      }
    });
  });
  return gradient;
}

std::tuple<Tensor, Tensor> sampled_factor_gradients(const Tensor& gradient, const Tensor& row_starts,
                                                    const Tensor& row_index, const Tensor& column_starts,
                                                    const Tensor& column_index, const Tensor& order,
                                                    const Tensor& lora_a, const Tensor& lora_b, const Tensor& scale) {
  const int64_t rank = lora_a.size(0), columns = lora_a.size(1), rows = lora_b.size(0), positions = row_index.numel();
  STD_TORCH_CHECK(lora_b.size(1) == rank && lora_a.scalar_type() == lora_b.scalar_type(), "A and B do not fit");
  STD_TORCH_CHECK(gradient.scalar_type() == ScalarType::Float && gradient.is_contiguous() &&
                      gradient.numel() == positions,
                  "gradient must be contiguous float32 [", positions, "]");
  check_device(lora_b, lora_a, "lora_b");
  check_device(gradient, lora_a, "gradient");
  const Device device(lora_a);
  const Segments by_row{read_positions(row_starts, lora_a, rows + 1, "row_starts"),
                        read_positions(row_index, lora_a, positions, "row_index"), nullptr};
  const Segments by_column{read_positions(column_starts, lora_a, columns + 1, "column_starts"),
                           read_positions(column_index, lora_a, positions, "column_index"), nullptr};
  const int32_t* p_order = read_positions(order, lora_a, positions, "order");
  const Tensor a = as_dense(lora_a), b = as_dense(lora_b);
  Tensor grad_a = torch::stable::new_empty(a, {rank, columns}), grad_b = torch::stable::new_empty(b, {rows, rank});
  with_type(a, "A and B", [&](auto element) {
    using F = decltype(element);
    device.launch("factor gradients of a sampled gradient", contract<F>, divide_up(rows + columns, kWarps), kThreads,
                  write<F>(grad_a), write<F>(grad_b), read<float>(gradient), by_row, by_column, p_order, read<F>(a),
                  read<F>(b), read_scale(scale, lora_a), rows, columns, static_cast<int>(rank));
  });
  return {grad_a, grad_b};
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CUDA, m) {
  m.impl("add_gathered_lora_", TORCH_BOX(&fade::add_gathered_lora_));
  m.impl("add_gathered_values_", TORCH_BOX(&fade::add_gathered_values_));
  m.impl("sampled_gradient", TORCH_BOX(&fade::sampled_gradient));
  m.impl("sampled_factor_gradients", TORCH_BOX(&fade::sampled_factor_gradients));
}
