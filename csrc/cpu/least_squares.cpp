// Masked least squares of some rows on the CPU: for a row i of a mask with support S, values[i] = rhs[i, S] (gram[S, S])⁻¹,
// and the price of dropping each entry. Rows of equal support share one factor; supports of similar size are factored
// kLanes at a time, one in each lane (least_squares_simd.h). All in float64. Definition: reference.py; rows whose triangles
// leave the second-level cache are for torch's own blocking (least_squares_by_size.py).
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>

#include "common/bitmask.h"
#include "common/least_squares.h"
#include "cpu/kernel.h"
#include "cpu/mask_words.h"

namespace fade {

constexpr int kLanes = 8;  // doubles of a vector in least_squares_simd.h, whatever the instruction set
constexpr int kBlock = 4;  // rows and columns of a block that stays in registers

// Where row i of a triangle begins, in numbers of each lane (least_squares_simd.h).
constexpr int64_t row_offset(int64_t i) {
  const int64_t block = i / kBlock;
  return kBlock * kBlock * block * (block + 1) / 2 + (i % kBlock) * kBlock * (block + 1);
}

}  // namespace fade

#if defined(__GNUC__)
// No vector crosses a call: every function that takes or returns one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define FADE_SIMD least_squares_baseline
#define FADE_TARGET
#include "cpu/least_squares_simd.h"
#undef FADE_SIMD
#undef FADE_TARGET
#if defined(__x86_64__) && defined(__GNUC__)
#define FADE_SIMD least_squares_avx2
#define FADE_TARGET __attribute__((target("avx2,fma")))
#include "cpu/least_squares_simd.h"
#undef FADE_SIMD
#undef FADE_TARGET
#define FADE_SIMD least_squares_avx512
#define FADE_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))
#include "cpu/least_squares_simd.h"
#undef FADE_SIMD
#undef FADE_TARGET
#endif

namespace fade {
namespace {

struct Loops {
  void (*factor)(double*, int64_t, double, double*, double*);
  void (*solve)(double*, int64_t, const double*, double*);
  void (*inverse_diagonal_of)(double*, int64_t, const double*, double*);
};

// The best that the processor has, or at most what FADE_CPU_CAPABILITY names.
Loops loops() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const char* asked = std::getenv("FADE_CPU_CAPABILITY");
  const std::string most = asked ? asked : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most == "avx512") {
    return {least_squares_avx512::factor, least_squares_avx512::solve, least_squares_avx512::inverse_diagonal_of};
  }
  if (has_avx2 && most != "baseline") {
    return {least_squares_avx2::factor, least_squares_avx2::solve, least_squares_avx2::inverse_diagonal_of};
  }
#endif
  return {least_squares_baseline::factor, least_squares_baseline::solve, least_squares_baseline::inverse_diagonal_of};
}

// A pivot at most this part of its diagonal is rounding: the block is singular. As in reference.py.
double pivot_tolerance(int64_t size) { return 8.0 * static_cast<double>(size) * std::numeric_limits<double>::epsilon(); }

// The supports of some rows of a mask, of at most `most` columns each: their columns as one list, and the rows in an order
// in which equal supports are neighbours and sizes ascend. Rows go by their positions among those given.
struct Supports {
  const int64_t* rows;           // which rows of the mask
  std::vector<int64_t> offsets;  // [rows + 1]
  std::vector<int32_t> columns;  // [offsets.back()]
  std::vector<int64_t> order;    // non-empty rows
  std::vector<int64_t> first;    // where each distinct support begins in `order`, and its length at the end

  int64_t size(int64_t position) const { return offsets[position + 1] - offsets[position]; }
  int64_t distinct() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t size_of(int64_t support) const { return size(order[first[support]]); }
  const int32_t* columns_of(int64_t support) const { return columns.data() + offsets[order[first[support]]]; }
  int64_t rows_of(int64_t support) const { return first[support + 1] - first[support]; }
  int64_t row(int64_t support, int64_t r) const { return rows[order[first[support] + r]]; }
};

Supports supports_of(const Tensor& mask_words, int64_t all_rows, int64_t columns, const Tensor& rows, int64_t most) {
  const Tensor dense = valid_words(mask_words, all_rows, columns);
  const auto* words = read<uint32_t>(dense);
  const int64_t width = words_per_row(columns), count = rows.numel();
  Supports s{read<int64_t>(rows)};
  const auto bits_of = [&](int64_t i) { return words + s.rows[i] * width; };
  s.offsets.assign(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(0 <= s.rows[i] && s.rows[i] < all_rows, "row ", s.rows[i], " of a mask with ", all_rows, " rows");
    int64_t bits = 0;
    for (int64_t w = 0; w < width; ++w) bits += std::popcount(bits_of(i)[w]);
    s.offsets[i + 1] = s.offsets[i] + std::min(bits, most);
  }
  s.columns.resize(s.offsets.back());
  for (int64_t i = 0; i < count; ++i) {
    int32_t* out = s.columns.data() + s.offsets[i];
    const int32_t* const end = s.columns.data() + s.offsets[i + 1];
    for (int64_t w = 0; out != end; ++w) {
      for (uint32_t word = bits_of(i)[w]; word != 0 && out != end; word &= word - 1) {
        *out++ = static_cast<int32_t>(w * kWordBits + std::countr_zero(word));
      }
    }
    if (s.size(i) > 0) s.order.push_back(i);
  }
  std::sort(s.order.begin(), s.order.end(), [&](int64_t a, int64_t b) {
    if (s.size(a) != s.size(b)) return s.size(a) < s.size(b);
    const int differ = std::memcmp(bits_of(a), bits_of(b), width * sizeof(uint32_t));
    return differ != 0 ? differ < 0 : a < b;
  });
  for (size_t i = 0; i < s.order.size(); ++i) {
    const bool begins = i == 0 || s.size(s.order[i]) != s.size(s.order[i - 1]) ||
                        std::memcmp(bits_of(s.order[i]), bits_of(s.order[i - 1]), width * sizeof(uint32_t)) != 0;
    if (begins) s.first.push_back(static_cast<int64_t>(i));
  }
  s.first.push_back(static_cast<int64_t>(s.order.size()));
  return s;
}

// The problem, and where its answers go.
template <typename T>
struct Problem {
  const T* rhs;        // [rows, columns]
  const double* gram;  // [columns, columns]
  int64_t columns;
  const Supports& supports;
  const int64_t* starts;  // [rows]: where a row's answers begin
  T* values;              // [count]
  T* prices;              // [count], or null
};

struct Scratch {
  std::vector<double> triangle, reciprocal, x, diagonal;
  void reserve(int64_t n) {
    triangle.resize(std::max<size_t>(triangle.size(), row_offset(n) * kLanes));
    for (auto* v : {&reciprocal, &x, &diagonal}) v->resize(std::max<size_t>(v->size(), n * kLanes));
  }
};

// Up to kLanes supports, padded to the largest with rows of the identity. Returns the lanes whose block is singular.
template <typename T>
uint32_t solve_in_lanes(const Problem<T>& p, const Loops& run, int64_t begin, int64_t end, Scratch& scratch) {
  const Supports& s = p.supports;
  const int lanes = static_cast<int>(end - begin);
  int64_t largest = 0, most_rows = 0;
  for (int64_t u = begin; u < end; ++u) {
    largest = std::max(largest, s.size_of(u));
    most_rows = std::max(most_rows, s.rows_of(u));
  }
  const int64_t n = (largest + kBlock - 1) / kBlock * kBlock;
  scratch.reserve(n);
  double* const triangle = scratch.triangle.data();
  for (int64_t i = 0; i < n; ++i) {
    double* const row = triangle + row_offset(i) * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t size = lane < lanes ? s.size_of(begin + lane) : 0;
      if (i < size) {
        const int32_t* columns = s.columns_of(begin + lane);
        const double* from = p.gram + columns[i] * p.columns;
        for (int64_t k = 0; k <= i; ++k) row[k * kLanes + lane] = from[columns[k]];
      } else {
        for (int64_t k = 0; k < i; ++k) row[k * kLanes + lane] = 0.0;
        row[i * kLanes + lane] = 1.0;
      }
    }
  }
  double smallest[kLanes];
  run.factor(triangle, n, pivot_tolerance(largest), scratch.reciprocal.data(), smallest);
  uint32_t singular = 0;
  for (int lane = 0; lane < lanes; ++lane) singular |= static_cast<uint32_t>(smallest[lane] < 0.0) << lane;

  double* const x = scratch.x.data();
  for (int64_t r = 0; r < most_rows; ++r) {
    std::fill(x, x + n * kLanes, 0.0);
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t u = begin + lane;
      if (r >= s.rows_of(u)) continue;
      const T* from = p.rhs + s.row(u, r) * p.columns;
      const int32_t* columns = s.columns_of(u);
      for (int64_t i = 0; i < s.size_of(u); ++i) x[i * kLanes + lane] = static_cast<double>(from[columns[i]]);
    }
    run.solve(triangle, n, scratch.reciprocal.data(), x);
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t u = begin + lane;
      if (r >= s.rows_of(u)) continue;
      T* to = p.values + p.starts[s.row(u, r)];
      for (int64_t i = 0; i < s.size_of(u); ++i) to[i] = static_cast<T>(x[i * kLanes + lane]);
    }
  }
  if (p.prices == nullptr) return singular;
  double* const diagonal = scratch.diagonal.data();
  run.inverse_diagonal_of(triangle, n, scratch.reciprocal.data(), diagonal);
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t u = begin + lane;
    for (int64_t r = 0; r < s.rows_of(u); ++r) {
      const int64_t at = p.starts[s.row(u, r)];
      for (int64_t i = 0; i < s.size_of(u); ++i) {
        const double value = static_cast<double>(p.values[at + i]);
        p.prices[at + i] = static_cast<T>(value * value / diagonal[i * kLanes + lane]);
      }
    }
  }
  return singular;
}

// Returns the first row whose block is singular, or `singular` if that is before it.
template <typename T>
int64_t solve_all(const Problem<T>& p, int64_t singular) {
  const Supports& s = p.supports;
  const int64_t batches = (s.distinct() + kLanes - 1) / kLanes;
  std::atomic<int64_t> left{batches};
  std::mutex mutex;
  const auto note = [&](int64_t support) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t r = 0; r < s.rows_of(support); ++r) singular = std::min(singular, s.row(support, r));
  };
  const Loops run = loops();
  // The largest first, each thread taking the next that nobody has: sizes differ too much for equal shares.
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, batches));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      Scratch scratch;
      for (int64_t b = left.fetch_sub(1) - 1; b >= 0; b = left.fetch_sub(1) - 1) {
        const int64_t begin = b * kLanes, end = std::min(begin + kLanes, s.distinct());
        const uint32_t lanes = solve_in_lanes(p, run, begin, end, scratch);
        for (int64_t u = begin; u < end; ++u) {
          if ((lanes >> (u - begin)) & 1u) note(u);
        }
      }
    }
  });
  return singular;
}

template <typename T>
void solve_as(const Tensor& values, const Tensor& prices, const Tensor& singular, const Tensor& rhs, const double* gram,
              const Supports& supports, const Tensor& starts) {
  auto* const first = write<int64_t>(singular);
  *first = solve_all(Problem<T>{read<T>(rhs), gram, rhs.size(1), supports, read<int64_t>(starts), write<T>(values),
                                prices.numel() > 0 ? write<T>(prices) : nullptr},
                     *first);
}

void masked_least_squares_rows_(Tensor values, Tensor prices, Tensor singular, const Tensor& rhs, const Tensor& gram,
                                const Tensor& mask_words, const Tensor& starts, const Tensor& rows, int64_t most) {
  const bool wide = check_least_squares(values, prices, singular, rhs, gram, starts, rows, most);
  const int64_t columns = rhs.size(1);
  const Supports supports = supports_of(mask_words, rhs.size(0), columns, rows, most);
  for (const int64_t i : supports.order) {
    const int64_t start = read<int64_t>(starts)[supports.rows[i]];
    STD_TORCH_CHECK(0 <= start && start + supports.size(i) <= values.numel(), "the entries of row ", supports.rows[i],
                    " do not fit into values [", values.numel(), "] from ", start, " on");
  }
  const Tensor dense = as_dense(rhs), square = as_dense(gram);
  if (wide) {
    solve_as<double>(values, prices, singular, dense, read<double>(square), supports, starts);
  } else {
    const std::vector<double> matrix(read<float>(square), read<float>(square) + columns * columns);
    solve_as<float>(values, prices, singular, dense, matrix.data(), supports, starts);
  }
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m) {
  m.impl("masked_least_squares_rows_", TORCH_BOX(&fade::masked_least_squares_rows_));
}
