// Masked least squares on CUDA: for each row i of a mask with support S, values[i] = rhs[i, S] (gram[S, S])⁻¹, and the
// price of dropping each entry. In float64; definition: fade_kernels/reference.py.
//
// A block solves a row. The lower triangle of gram[S, S] lies packed in shared memory, or, where it is too large for
// that, in a piece of device memory that the second-level cache holds. rhs[i, S] is one row more of it, so that the
// factorisation leaves L⁻¹ rhs there; a substitution from behind gives the values, and the triangle's inverse, formed in
// its place, the diagonal of (gram[S, S])⁻¹ as sums of squares. Sums have a fixed order: a row's answer depends neither
// on other rows nor on the launch.
#include "common/bitmask.h"

#include "cuda/kernel.h"

#include <cfloat>

namespace fade {
namespace {

// A pivot at most this part of its diagonal, times the size, is rounding: the block is singular. As in reference.py.
constexpr double kPivotTolerance = 8.0 * DBL_EPSILON;
// Of pieces of device memory for triangles that shared memory does not hold.
constexpr int64_t kMostWorkspaceBytes = int64_t{64} << 20;

// Numbers before row i of a packed triangle.
FADE_HOST_DEVICE constexpr int64_t row_offset(int64_t i) { return i * (i + 1) / 2; }

// Of a system with n unknowns: the triangle and the right-hand side below it.
FADE_HOST_DEVICE constexpr int64_t triangle_numbers(int64_t n) { return row_offset(n) + n; }

// Beside it: a column, a row, diagonals and reciprocal pivots, and the support.
constexpr int kVectors = 4;
constexpr int64_t vector_bytes(int64_t n) {
  return n * kVectors * static_cast<int64_t>(sizeof(double)) + (n + 1) / 2 * 2 * static_cast<int64_t>(sizeof(int32_t));
}

template <typename T>
struct System {
  const T* rhs;           // [rows, columns]
  const T* gram;          // [columns, columns]
  const uint32_t* words;  // [rows, width]
  const int64_t* starts;  // of each row's values
  const int64_t* order;   // [count] rows to solve
  int64_t count, columns, width;
  T* values;
  T* prices;  // or null
  int64_t* singular;
  int most;           // entries that a row has at most
  double* workspace;  // [blocks, triangle_numbers(most)] where the triangles do not lie in shared memory
};

// The columns of a row's set bits; returns how many. All threads take part.
__device__ __forceinline__ int find_support(const uint32_t* words, int64_t width, int64_t columns, int32_t* support,
                                            int most) {
  __shared__ int found;
  int before = 0;
  for (int64_t first = 0; first < width; first += blockDim.x) {
    const int64_t w = first + threadIdx.x;
    uint32_t word = w < width ? words[w] & column_bits(w, columns) : 0u;
    int at = before + block_exclusive_scan(__popc(word));
    for (; word != 0; word &= word - 1, ++at) {
      // A row with more entries than the caller says must stay harmless.
      if (at < most) support[at] = static_cast<int32_t>(w * kWordBits + __ffs(word) - 1);
    }
    if (threadIdx.x == blockDim.x - 1) found = at;
    __syncthreads();
    before = found;
    __syncthreads();
  }
  return min(before, most);
}

// L of the triangle's n rows in place, but for its diagonal, whose reciprocals go to `pivots`; the row below becomes
// L⁻¹ rhs. Returns whether the matrix is positive definite.
__device__ __forceinline__ bool factor(double* a, int n, const double* diagonal, double* column, double* pivots) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int j = 0; j < n; ++j) {
    const double pivot = a[row_offset(j) + j];
    if (!(pivot > kPivotTolerance * n * diagonal[j])) return false;  // all threads alike
    const double reciprocal = rsqrt(pivot);
    if (threadIdx.x == 0) pivots[j] = reciprocal;
    for (int i = j + 1 + threadIdx.x; i <= n; i += blockDim.x) {
      double* const entry = a + row_offset(i) + j;
      column[i - 1] = *entry = *entry * reciprocal;
    }
    __syncthreads();
    for (int i = j + 1 + warp; i <= n; i += warps) {
      double* const row = a + row_offset(i);
      const double own = column[i - 1];
      for (int k = j + 1 + lane; k <= min(i, n - 1); k += kWarpSize) row[k] -= own * column[k - 1];
    }
    __syncthreads();
  }
  return true;
}

// Replaces L, whose diagonal's reciprocals are `pivots`, by its inverse, row by row; `sums` becomes the sums of squares
// of the inverse's columns.
__device__ __forceinline__ void invert(double* a, int n, const double* pivots, double* line, double* sums) {
  for (int i = 0; i < n; ++i) {
    double* const row = a + row_offset(i);
    for (int k = threadIdx.x; k < i; k += blockDim.x) line[k] = row[k];
    __syncthreads();
    for (int j = threadIdx.x; j <= i; j += blockDim.x) {
      double value = pivots[i];
      if (j < i) {
        double sum = 0.0;
        const double* above = a + row_offset(j) + j;
#pragma unroll 4
        for (int k = j; k < i; ++k) {
          sum += line[k] * *above;
          above += k + 1;
        }
        value *= -sum;
      }
      row[j] = value;
      sums[j] = (j < i ? sums[j] : 0.0) + value * value;
    }
    __syncthreads();
  }
}

template <typename T, bool shared>
__global__ void __launch_bounds__(kThreads, 4) solve_rows(System<T> s) {
  extern __shared__ double numbers[];
  double* const vectors = shared ? numbers + triangle_numbers(s.most) : numbers;
  double* const a = shared ? numbers : s.workspace + blockIdx.x * triangle_numbers(s.most);
  double *const column = vectors, *const line = column + s.most;
  double *const diagonal = line + s.most, *const pivots = diagonal + s.most;
  auto* const support = reinterpret_cast<int32_t*>(pivots + s.most);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int64_t r = blockIdx.x; r < s.count; r += gridDim.x) {
    const int64_t index = s.order[r];
    const int n = find_support(s.words + index * s.width, s.width, s.columns, support, s.most);
    for (int i = warp; i <= n; i += warps) {
      const T* from = i < n ? s.gram + support[i] * s.columns : s.rhs + index * s.columns;
      double* const row = a + row_offset(i);
      for (int k = lane; k <= min(i, n - 1); k += kWarpSize) {
        const auto value = static_cast<double>(from[support[k]]);
        row[k] = value;
        if (k == i) diagonal[k] = value;
      }
    }
    __syncthreads();
    if (!factor(a, n, diagonal, column, pivots)) {
      if (threadIdx.x == 0) atomicMin(reinterpret_cast<long long*>(s.singular), static_cast<long long>(index));
      for (int j = threadIdx.x; j < n; j += blockDim.x) {
        s.values[s.starts[index] + j] = 0;
        if (s.prices != nullptr) s.prices[s.starts[index] + j] = 0;
      }
      __syncthreads();
      continue;
    }
    double* const y = a + row_offset(n);
    for (int j = n - 1; j >= 0; --j) {
      const double x = y[j] * pivots[j];
      for (int i = threadIdx.x; i < j; i += blockDim.x) y[i] -= a[row_offset(j) + i] * x;
      if (threadIdx.x == 0) column[j] = x;
      __syncthreads();
    }
    if (s.prices != nullptr) invert(a, n, pivots, line, diagonal);
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
      s.values[s.starts[index] + j] = static_cast<T>(column[j]);
      if (s.prices != nullptr) s.prices[s.starts[index] + j] = static_cast<T>(column[j] * column[j] / diagonal[j]);
    }
    __syncthreads();  // all of it is overwritten by the next row
  }
}

template <typename T>
void launch(const Device& device, const Tensor& values, const Tensor& prices, const Tensor& singular, const Tensor& rhs,
            const Tensor& gram, const Tensor& mask_words, const Tensor& starts, const Tensor& rows, int64_t most) {
  const Tensor dense = as_dense(rhs), square = as_dense(gram), words = as_dense(mask_words);
  const int64_t count = rows.numel(), triangle = triangle_numbers(most) * static_cast<int64_t>(sizeof(double));
  const bool shared = triangle + vector_bytes(most) + 1024 <= device.shared_bytes();  // and what is there always
  const int64_t pieces = std::max<int64_t>(1, std::min(2 * device.multiprocessors(), kMostWorkspaceBytes / triangle));
  const int64_t blocks = std::min(count, shared ? count : pieces);
  Tensor workspace;
  if (!shared) workspace = torch::stable::new_empty(rhs, {blocks, triangle_numbers(most)}, ScalarType::Double);
  const System<T> system{
      read<T>(dense), read<T>(square), read<uint32_t>(words), read<int64_t>(starts), read<int64_t>(rows), count,
      rhs.size(1), words.size(1), write<T>(values), prices.numel() > 0 ? write<T>(prices) : nullptr,
      write<int64_t>(singular), static_cast<int>(most), shared ? nullptr : write<double>(workspace)};
  const int threads = most <= 32 ? 32 : most <= 64 ? 64 : most <= 128 ? 128 : kThreads;
  device.launch_with_shared("masked_least_squares_rows_", shared ? solve_rows<T, true> : solve_rows<T, false>, blocks,
                            threads, (shared ? triangle : 0) + vector_bytes(most), system);
}

void masked_least_squares_rows_(Tensor values, Tensor prices, Tensor singular, const Tensor& rhs, const Tensor& gram,
                                const Tensor& mask_words, const Tensor& starts, const Tensor& rows, int64_t most) {
  const bool wide = rhs.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || rhs.scalar_type() == ScalarType::Float, "rhs must be float32 or float64");
  for (const auto& other : {gram, values, prices}) {
    STD_TORCH_CHECK(other.scalar_type() == rhs.scalar_type(), "gram, values and prices must be of rhs's dtype");
  }
  for (const auto& indices : {starts, rows, singular}) {
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "starts, rows and singular must be int64");
  }
  for (const auto& other : {values, prices, singular, starts, rows}) {
    STD_TORCH_CHECK(other.is_contiguous(), "what is written, starts and rows must be contiguous");
  }
  STD_TORCH_CHECK(rhs.dim() == 2 && gram.dim() == 2 && gram.size(0) == rhs.size(1) && gram.size(1) == rhs.size(1),
                  "rhs [N, K] and gram [K, K] must fit");
  STD_TORCH_CHECK(most >= 1 && most <= 4096, "rows of at most 4096 entries are solved, not of ", most);
  const Device device(rhs);
  if (wide) {
    launch<double>(device, values, prices, singular, rhs, gram, mask_words, starts, rows, most);
  } else {
    launch<float>(device, values, prices, singular, rhs, gram, mask_words, starts, rows, most);
  }
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CUDA, m) {
  m.impl("masked_least_squares_rows_", TORCH_BOX(&fade::masked_least_squares_rows_));
}
