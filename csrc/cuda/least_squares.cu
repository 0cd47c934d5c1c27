// Masked least squares on CUDA: for each row i of a mask with support S, values[i] = rhs[i, S] (gram[S, S])⁻¹, and the
// price of dropping each entry. In float64; definition: fade_kernels/reference.py.
//
// A block solves a row. The lower triangle of gram[S, S] lies packed in shared memory; of one that is too large for that,
// the last rows lie in device memory, which the second-level cache holds. rhs[i, S] is one row more of it, so that the
// factorisation leaves L⁻¹ rhs there; a substitution from behind gives the values, and the triangle's inverse, formed in
// its place, the diagonal of (gram[S, S])⁻¹ as sums of squares. Both go through the triangle in panels of kPanel columns
// or rows, so that a number brought from shared memory is used that often, and barriers are as few. Sums have a fixed
// order: a row's answer depends neither on other rows nor on the launch.
#include "common/bitmask.h"
#include "common/least_squares.h"

#include "cuda/kernel.h"

#include <cfloat>

namespace fade {
namespace {

// A pivot at most this part of its diagonal, times the size, is rounding: the block is singular. As in reference.py.
constexpr double kPivotTolerance = 8.0 * DBL_EPSILON;
constexpr int kPanel = 4;
// Rows of the triangle that a warp updates at once.
constexpr int kRows = 4;

// Numbers before row i of a packed triangle.
FADE_HOST_DEVICE constexpr int64_t row_offset(int64_t i) { return i * (i + 1) / 2; }

// Beside the triangle and the right-hand side below it, of a system with n unknowns: a panel, the solution, diagonals
// and reciprocal pivots, and the support.
constexpr int64_t vector_numbers(int64_t n) { return kPanel * (n + 1) + 3 * n + (n + 1) / 2; }

// A packed triangle of which the first `kept` rows are in shared memory, or all of them (`whole`).
template <bool whole>
struct Triangle {
  double* shared;
  double* beyond;
  int kept;

  __device__ __forceinline__ double* row(int i) const {
    if constexpr (whole) return shared + row_offset(i);
    return i < kept ? shared + row_offset(i) : beyond + (row_offset(i) - row_offset(kept));
  }
};

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
  int kept;           // rows of a triangle in shared memory, of most + 1
  double* workspace;  // [blocks, numbers of the others]
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
// L⁻¹ rhs. `panel` is [kPanel, n + 1]. Returns whether the matrix is positive definite, to all threads alike.
template <bool whole>
__device__ __forceinline__ bool factor(const Triangle<whole>& a, int n, const double* diagonal, double* panel,
                                       double* pivots) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int first = 0; first < n; first += kPanel) {
    const int next = min(first + kPanel, n);
    // Every thread factors the block on the diagonal for itself: that is sooner done than told. Beyond the last column
    // it is the identity.
    double block[kPanel][kPanel], reciprocal[kPanel];
#pragma unroll
    for (int r = 0; r < kPanel; ++r) {
#pragma unroll
      for (int c = 0; c <= r; ++c) block[r][c] = first + r < n ? a.row(first + r)[first + c] : r == c ? 1.0 : 0.0;
    }
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      if (first + c < n && !(block[c][c] > kPivotTolerance * n * diagonal[first + c])) return false;
      reciprocal[c] = rsqrt(block[c][c]);
#pragma unroll
      for (int r = c + 1; r < kPanel; ++r) {
        block[r][c] *= reciprocal[c];
#pragma unroll
        for (int k = c + 1; k <= r; ++k) block[r][k] -= block[r][c] * block[k][c];
      }
    }
    for (int i = next + threadIdx.x; i <= n; i += blockDim.x) {
      double* const row = a.row(i) + first;
      double own[kPanel];
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        double value = first + c < n ? row[c] : 0.0;
#pragma unroll
        for (int k = 0; k < c; ++k) value -= own[k] * block[c][k];
        own[c] = value * reciprocal[c];
        if (first + c < n) row[c] = own[c];
        panel[c * (n + 1) + i] = own[c];
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // whoever read the block has factored it
#pragma unroll
      for (int r = 0; r < kPanel; ++r) {
        if (first + r >= n) break;
        pivots[first + r] = reciprocal[r];
#pragma unroll
        for (int c = 0; c < r; ++c) a.row(first + r)[first + c] = block[r][c];
      }
    }
    for (int i = next + kRows * warp; i <= n; i += kRows * warps) {
      double own[kRows][kPanel];
      double* rows[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        rows[r] = a.row(min(i + r, n));
#pragma unroll
        for (int c = 0; c < kPanel; ++c) own[r][c] = panel[c * (n + 1) + min(i + r, n)];
      }
      for (int k = next + lane; k <= min(i + kRows - 1, n - 1); k += kWarpSize) {
        double column[kPanel];
#pragma unroll
        for (int c = 0; c < kPanel; ++c) column[c] = panel[c * (n + 1) + k];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (k > i + r || i + r > n) continue;
          double value = rows[r][k];
#pragma unroll
          for (int c = 0; c < kPanel; ++c) value -= own[r][c] * column[c];
          rows[r][k] = value;
        }
      }
    }
    __syncthreads();
  }
  return true;
}

// Replaces L, whose diagonal's reciprocals are `pivots`, by its inverse, kPanel rows at a time, of which `lines`
// [n, kPanel] holds L; `sums` becomes the sums of squares of the inverse's columns.
template <bool whole>
__device__ __forceinline__ void invert(const Triangle<whole>& a, int n, const double* pivots, double* lines,
                                       double* sums) {
  for (int first = 0; first < n; first += kPanel) {
    const int next = min(first + kPanel, n);
    for (int at = threadIdx.x; at < kPanel * next; at += blockDim.x) {
      const int k = at / kPanel, i = first + at % kPanel;
      lines[at] = i < n && k < i ? a.row(i)[k] : 0.0;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < next; j += blockDim.x) {
      double sum[kPanel] = {};
      const auto add = [&](const double* above, int begin, int end) {
#pragma unroll 4
        for (int k = begin; k < end; ++k) {
#pragma unroll
          for (int r = 0; r < kPanel; ++r) sum[r] += lines[k * kPanel + r] * *above;
          above += k + 1;
        }
      };
      if constexpr (whole) {
        add(a.row(j) + j, j, first);
      } else {
        const int middle = min(first, a.kept);
        add(a.row(j) + j, j, middle);
        if (first > middle) add(a.row(max(j, middle)) + j, max(j, middle), first);
      }
      double square = j < first ? sums[j] : 0.0, own[kPanel];
#pragma unroll
      for (int r = 0; r < kPanel; ++r) {
        if (first + r >= n) break;
        double value = (first + r == j ? 1.0 : 0.0) - sum[r];
#pragma unroll
        for (int k = 0; k < r; ++k) value -= lines[(first + k) * kPanel + r] * own[k];
        own[r] = value * pivots[first + r];
        square += own[r] * own[r];
        if (j <= first + r) a.row(first + r)[j] = own[r];
      }
      sums[j] = square;
    }
    __syncthreads();
  }
}

template <typename T, bool whole>
__global__ void __launch_bounds__(kThreads, 2) solve_rows(System<T> s) {
  extern __shared__ double numbers[];
  double* const panel = numbers + row_offset(s.kept);
  double *const solution = panel + kPanel * (s.most + 1), *const diagonal = solution + s.most;
  double* const pivots = diagonal + s.most;
  auto* const support = reinterpret_cast<int32_t*>(pivots + s.most);
  const int64_t beyond = row_offset(s.most + 1) - row_offset(s.kept);
  const Triangle<whole> a{numbers, whole ? nullptr : s.workspace + blockIdx.x * beyond, s.kept};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int64_t r = blockIdx.x; r < s.count; r += gridDim.x) {
    const int64_t index = s.order[r];
    const int n = find_support(s.words + index * s.width, s.width, s.columns, support, s.most);
    for (int i = warp; i <= n; i += warps) {
      const T* from = i < n ? s.gram + support[i] * s.columns : s.rhs + index * s.columns;
      double* const row = a.row(i);
      for (int k = lane; k <= min(i, n - 1); k += kWarpSize) {
        const auto value = static_cast<double>(from[support[k]]);
        row[k] = value;
        if (k == i) diagonal[k] = value;
      }
    }
    __syncthreads();
    if (!factor(a, n, diagonal, panel, pivots)) {
      if (threadIdx.x == 0) atomicMin(reinterpret_cast<long long*>(s.singular), static_cast<long long>(index));
      for (int j = threadIdx.x; j < n; j += blockDim.x) {
        s.values[s.starts[index] + j] = 0;
        if (s.prices != nullptr) s.prices[s.starts[index] + j] = 0;
      }
      __syncthreads();
      continue;
    }
    double* const y = a.row(n);
    for (int j = n - 1; j >= 0; --j) {
      const double x = y[j] * pivots[j];
      const double* const row = a.row(j);
      for (int i = threadIdx.x; i < j; i += blockDim.x) y[i] -= row[i] * x;
      if (threadIdx.x == 0) solution[j] = x;
      __syncthreads();
    }
    if (s.prices != nullptr) invert(a, n, pivots, panel, diagonal);
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
      s.values[s.starts[index] + j] = static_cast<T>(solution[j]);
      if (s.prices != nullptr) s.prices[s.starts[index] + j] = static_cast<T>(solution[j] * solution[j] / diagonal[j]);
    }
    __syncthreads();  // all of it is overwritten by the next row
  }
}

template <typename T>
void launch(const Device& device, const Tensor& values, const Tensor& prices, const Tensor& singular, const Tensor& rhs,
            const Tensor& gram, const Tensor& mask_words, const Tensor& starts, const Tensor& rows, int64_t most) {
  const Tensor dense = as_dense(rhs), square = as_dense(gram), words = as_dense(mask_words);
  const int64_t count = rows.numel(), vectors = vector_numbers(most);
  // What a block may have, but for what is there always.
  const int64_t numbers = (device.shared_bytes() - 1024) / static_cast<int64_t>(sizeof(double)) - vectors;
  int64_t kept = most + 1;
  while (row_offset(kept) > numbers) --kept;
  const bool whole = kept > most;
  const int64_t blocks = std::min(count, whole ? count : 2 * device.multiprocessors());
  Tensor workspace;
  if (!whole) {
    workspace = torch::stable::new_empty(rhs, {blocks, row_offset(most + 1) - row_offset(kept)}, ScalarType::Double);
  }
  const System<T> system{
      read<T>(dense), read<T>(square), read<uint32_t>(words), read<int64_t>(starts), read<int64_t>(rows), count,
      rhs.size(1), words.size(1), write<T>(values), prices.numel() > 0 ? write<T>(prices) : nullptr,
      write<int64_t>(singular), static_cast<int>(most), static_cast<int>(kept),
      whole ? nullptr : write<double>(workspace)};
  const int threads = most <= 32 ? 32 : most <= 64 ? 64 : most <= 128 ? 128 : kThreads;
  device.launch_with_shared("masked_least_squares_rows_", whole ? solve_rows<T, true> : solve_rows<T, false>, blocks,
                            threads, (row_offset(kept) + vectors) * static_cast<int64_t>(sizeof(double)), system);
}

void masked_least_squares_rows_(Tensor values, Tensor prices, Tensor singular, const Tensor& rhs, const Tensor& gram,
                                const Tensor& mask_words, const Tensor& starts, const Tensor& rows, int64_t most) {
  const bool wide = check_least_squares(values, prices, singular, rhs, gram, starts, rows, most);
  STD_TORCH_CHECK(most <= 512, "rows of at most 512 entries are solved here, not of ", most);
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
