// Masked LoRA on the CPU: y = x (W + s M o (B A))^T, its input gradient and its factor gradients, and the same with the
// delta given by its values. Dense work goes to torch's BLAS; what the mask makes sparse is done here, by the regime
// that the cost table below predicts to be fastest. Definitions: fade_kernels/reference.py; loops: masked_lora_simd.h.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/bitmask.h"
#include "common/stochastic.h"
#include "cpu/kernel.h"
#include "cpu/mask_words.h"

namespace fade {

constexpr int64_t kLanes = 16;  // elements of a vector in masked_lora_simd.h, whatever the instruction set
constexpr int64_t kTile = 32;   // rows and columns of a tile; one mask word wide

// The inner loops for one instruction set; the arrays are indexed by log2 of the panel's vectors: 1, 2, 4, 8.
template <typename T>
struct Kernels {
  void (*count_bits)(const uint32_t* words, int64_t width, int64_t* bits, int64_t* occupied);
  void (*decode_row)(const uint32_t* words, int64_t width, int64_t count, int32_t* columns);
  void (*clear_outside)(const uint32_t* words, int64_t columns, T* row);
  void (*scatter_add_at)(const int32_t* columns, int64_t count, const T* values, T scale, T* row);
  void (*scatter_add)(const uint32_t* words, int64_t width, const T* values, T scale, T* row);
  void (*factor_values_at)(const int32_t* columns, int64_t count, const T* a_t, const T* b, int64_t rp, T* values);
  void (*factor_values)(const uint32_t* words, int64_t width, const T* a_padded, const T* b, int64_t r, T* values);
  void (*transpose_in)(const T* x, int64_t stride, int64_t tall, int64_t columns, T* panel, int64_t wide);
  void (*transpose_add)(const T* panel, int64_t wide, int64_t tall, int64_t columns, T* y, int64_t stride);
  void (*product_rows[4])(const T* x_panel, int64_t begin, int64_t end, const int64_t* offsets, const int32_t* columns,
                          const T* values, T* y_panel);
  void (*product_columns[4])(const T* dy_panel, int64_t begin, int64_t end, const int64_t* offsets,
                             const int32_t* columns, const T* values, T* dx_panel);
  void (*sampled_rows[4])(const T* dy_panel, const T* x_panel, int64_t begin, int64_t end, int64_t k, int64_t block,
                          const int64_t* offsets, const int32_t* columns, int64_t* cursor, T* gradient);
  void (*outer_product_tile)(const T* dy, const T* x, int64_t stride, int64_t tall, T* tile);
  void (*contract_tile)(const T* tile, int64_t wide, const T* a_t, const T* b, int64_t rp, T* db, T* da_t);
  void (*contract_rows)(int64_t begin, int64_t end, const int64_t* offsets, const int32_t* columns, const T* gradient,
                        const T* a_t, const T* b, int64_t rp, T* db, T* da_t);
};

}  // namespace fade

#if defined(__GNUC__)
// No vector crosses a call: every function that takes or returns one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define FADE_SIMD baseline
#define FADE_TARGET
#define FADE_REGISTER_BYTES 16
#include "cpu/masked_lora_simd.h"
#undef FADE_SIMD
#undef FADE_TARGET
#undef FADE_REGISTER_BYTES
#if defined(__x86_64__) && defined(__GNUC__)
#define FADE_SIMD avx2
#define FADE_TARGET __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define FADE_REGISTER_BYTES 32
#include "cpu/masked_lora_simd.h"
#undef FADE_SIMD
#undef FADE_TARGET
#undef FADE_REGISTER_BYTES
#define FADE_SIMD avx512
#define FADE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")))
#define FADE_REGISTER_BYTES 64
#include "cpu/masked_lora_simd.h"
#undef FADE_SIMD
#undef FADE_TARGET
#undef FADE_REGISTER_BYTES
#endif
namespace fade {
namespace {

using Optional = std::optional<Tensor>;

// The processor's best instruction set; FADE_CPU_CAPABILITY=avx2 or baseline asks for less, so that tests reach all.
template <typename T>
const Kernels<T>& kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Kernels<T>& best = []() -> const Kernels<T>& {
    __builtin_cpu_init();
    const char* asked = std::getenv("FADE_CPU_CAPABILITY");
    const std::string most = asked ? asked : "avx512";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                          __builtin_cpu_supports("popcnt");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && most == "avx512") return avx512::table<T>();
    if (has_avx2 && most != "baseline") return avx2::table<T>();
    return baseline::table<T>();
  }();
  return best;
#else
  return baseline::table<T>();
#endif
}

// ---- choice of kernel -----------------------------------------------------------------------------------------------

// What a caller may force; kAuto takes the cheapest by the table. Products know only gather and, for the others, the
// effective weight. The numbers are those of REGIMES in fade_kernels/masked_lora.py.
enum class Regime : int64_t { kAuto, kGather, kTile, kWhole };

// Nanoseconds of one core per unit named, measured on an AMD EPYC (Zen 4 at 2.6 GHz, AVX-512, fp32, r = 16) with the
// shapes of bench/shapes.py; only their ratios matter. In brackets: the shape and the densities they were fitted to.
namespace cost {
constexpr double kGemm = 0.0215;        // multiply-add in torch's BLAS, T N K [all shapes: 0.0207 to 0.0240]
constexpr double kCopy = 0.40;          // element of W copied to scratch and read back, N K [T 64, N K 1280, 1 %]
constexpr double kScatter = 2.0;        // value added to the scratch at a position [T 256, N K 1280, 10 %]
constexpr double kScatterFilled = 0.3;  // the same where whole words are set [T 256, N K 1280, 100 %]
constexpr double kTranspose = 0.30;     // element of x, y, dy or dx to or from a panel [T 4096, N K 320, 1 %]
constexpr double kRows = 0.033;         // multiply-add of the gather product, T nnz [T 4096, N K 320, 10 %]
constexpr double kColumns = 0.060;      // multiply-add of its transpose, T nnz [T 4096, N K 320, 10 %]
constexpr double kSampled = 0.045;      // multiply-add of the sampled product, T nnz [T 256, N K 1280, 10 %]
constexpr double kTiles = 0.027;        // multiply-add of the tile kernel, 1024 T tiles [T 4096, N K 320, 20 %]
constexpr double kContract = 3.4;       // value decoded and contracted with A and B [N K 1280, 100 %]
constexpr double kContractTile = 1.2;   // element of a tile masked and contracted [T 64, N K 1280, 20 %]
constexpr double kContractBlock = 1.0;  // element of a dense gradient masked and contracted [T 64, N K 1280, 100 %]
}  // namespace cost

enum class Product { kGather, kEffectiveWeight };

// `multiply` is kRows or kColumns; `filled` says whether the mask's occupied words are well filled.
Product choose_product(Regime forced, bool has_weight, bool filled, int64_t t, int64_t n, int64_t k, int64_t nonzeros,
                       double multiply) {
  if (forced == Regime::kGather) return Product::kGather;
  if (forced != Regime::kAuto) return Product::kEffectiveWeight;
  const double base = has_weight ? 0.0 : cost::kGemm * t * n * k;  // without W, the GEMM exists only for the delta
  const double effective = base + cost::kCopy * n * k + (filled ? cost::kScatterFilled : cost::kScatter) * nonzeros;
  const double gather = cost::kTranspose * t * (n + k) + multiply * t * nonzeros;
  return gather < effective ? Product::kGather : Product::kEffectiveWeight;
}

Regime choose_gradient(Regime forced, int64_t t, int64_t n, int64_t k, int64_t nonzeros, int64_t tiles) {
  if (forced != Regime::kAuto) return forced;
  const double gather = cost::kTranspose * t * (n + k) + (cost::kSampled * t + cost::kContract) * nonzeros;
  const double tile = (cost::kTiles * t + cost::kContractTile) * tiles * kTile * kTile;
  const double whole = cost::kGemm * t * n * k + cost::kContractBlock * n * k;
  if (gather <= tile && gather <= whole) return Regime::kGather;
  return tile <= whole ? Regime::kTile : Regime::kWhole;
}

// ---- helpers --------------------------------------------------------------------------------------------------------

template <typename T>
constexpr ScalarType dtype_of() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised memory, aligned to cache lines.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) {
    const size_t bytes = (static_cast<size_t>(std::max<int64_t>(size, 1)) * sizeof(T) + 63) / 64 * 64;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T, Free> memory_;
};

// [rows, columns] of uninitialised memory that this thread uses again next time, because fresh pages cost as much as
// the copy of a weight into them. Valid until the next call; layers share it, so it is as large as the largest layer so
// far, but nothing above kKept is held on to.
template <typename T>
Tensor scratch(const Tensor& like, int64_t rows, int64_t columns) {
  constexpr int64_t kKept = 64 << 20;              // bytes
  thread_local Buffer<T>* kept = new Buffer<T>();  // never freed: a thread may end after torch does
  thread_local int64_t kept_size = 0;
  const int64_t size = rows * columns;
  if (size * static_cast<int64_t>(sizeof(T)) > kKept) {
    return torch::stable::new_empty(like, {rows, columns}, dtype_of<T>());
  }
  if (size > kept_size || !kept->get()) {
    *kept = Buffer<T>(size);
    kept_size = size;
  }
  return torch::stable::from_blob(kept->get(), {rows, columns}, {columns, 1}, like.device(), dtype_of<T>());
}

// Hands out tasks to whichever worker is free. A task's result must not depend on who runs it, so results stay
// deterministic while uneven tasks stay balanced.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t tasks) : tasks_(tasks) {}
  bool next(int64_t& task) { return (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t tasks_;
};

// Runs worker(queue) on as many threads as `tasks` and `work` (elements touched) are worth.
template <typename Worker>
void share_tasks(int64_t tasks, int64_t work, const Worker& worker) {
  TaskQueue queue(tasks);
  const int64_t worth = std::max<int64_t>(1, work / kGrainSize);
  const int64_t workers = std::min({tasks, worth, static_cast<int64_t>(torch::stable::get_num_threads())});
  if (workers <= 1) return worker(queue);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(queue);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor as_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Optional as_type(const Optional& tensor, ScalarType dtype) {
  return tensor ? Optional(as_type(*tensor, dtype)) : Optional();
}

// fp64 is computed in fp64; everything else in fp32, so that a small delta is not lost in a 16-bit weight.
ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename Call>
auto with_compute_type(const Tensor& x, Call call) {
  return compute_type(x) == ScalarType::Double ? call(double{}) : call(float{});
}

double scalar_value(const Tensor& scale) {
  if (scale.scalar_type() == ScalarType::Float) return *read<float>(scale);
  return *read<double>(as_type(scale, ScalarType::Double));
}

// Product of all dimensions but the last.
int64_t row_count(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
  return count;
}

// A batch of rows: [..., columns] flattened to two dimensions, each row contiguous.
struct Rows {
  Tensor tensor;  // [count, columns]
  int64_t count, columns, stride;

  template <typename T>
  const T* data() const {
    return read<T>(tensor);
  }
};

template <typename T>
Rows as_rows(const Tensor& x, int64_t columns) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == columns, "rows must end in ", columns, " features");
  const int64_t count = row_count(x);
  Tensor flat = as_type(x, dtype_of<T>());
  if (flat.dim() != 2) flat = torch::stable::reshape(flat, {count, columns});
  if (flat.stride(1) != 1 || flat.stride(0) < columns) flat = torch::stable::contiguous(flat);
  return Rows{flat, count, columns, count > 1 ? flat.stride(0) : columns};
}

void check_same_count(const Rows& dy, const Rows& x) {
  STD_TORCH_CHECK(dy.count == x.count, "dy has ", dy.count, " rows, x ", x.count);
}

// [..., columns] with the leading dimensions of `like`.
Tensor empty_rows(const Tensor& like, int64_t columns, ScalarType dtype) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = columns;
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor as_two_dimensions(const Tensor& rows, int64_t columns) {
  return rows.dim() == 2 ? rows : torch::stable::view(rows, {row_count(rows), columns});
}

// A block of rows transposed to [columns, wide]; wide is 16, 32, 64 or 128 and at least tall.
struct Panel {
  int64_t first, tall, wide;
  int level() const { return wide == 8 * kLanes ? 3 : wide == 4 * kLanes ? 2 : wide == 2 * kLanes ? 1 : 0; }
};

// Full panels of `widest` rows, then ever narrower ones: at most 15 rows of padding in all.
std::vector<Panel> split_rows(int64_t begin, int64_t end, int64_t widest) {
  std::vector<Panel> panels;
  for (int64_t wide = widest; begin < end; wide = std::max(kLanes, wide / 2)) {
    while (end - begin >= wide || (wide == kLanes && begin < end)) {
      const int64_t tall = std::min(wide, end - begin);
      panels.push_back({begin, tall, wide});
      begin += tall;
    }
  }
  return panels;
}

// ---- mask and delta -------------------------------------------------------------------------------------------------

// A packed mask with the position of every row's first value and, once decoded, the column of every value.
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
    const auto count_bits = kernels<float>().count_bits;
    std::atomic<int64_t> occupied_words{0};
    torch::stable::parallel_for(0, rows, 8 * grain(), [&](int64_t begin, int64_t end) {
      int64_t sum = 0, occupied = 0;
      for (int64_t n = begin; n < end; ++n, sum += occupied) count_bits(row(n), width, &offsets[n + 1], &occupied);
      occupied_words += sum;
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
      const auto decode_row = kernels<float>().decode_row;
      torch::stable::parallel_for(0, rows, 8 * grain(), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) decode_row(row(n), width, count(n), positions_.get() + offsets[n]);
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

void check_matrix(const Tensor& matrix, const Mask& mask, const char* name) {
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
  const Factors<T>* factors_ = nullptr;
  const T* a_padded_ = nullptr;  // A [r, 32 * width]
  const T* values_ = nullptr;
  Buffer<T> own_;
};

// ---- products -------------------------------------------------------------------------------------------------------

// Rows a panel takes when whole panels are handed to threads: as many as keep every thread busy.
int64_t panel_rows(int64_t rows) {
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

// ---- gradient of the delta ------------------------------------------------------------------------------------------

constexpr int64_t kPartialValues = 1 << 20;  // most gradient values held in partial sums

// gradient [nnz] = sum_t dy[t, n] x[t, k] at the mask's positions, from transposed panels. A task has its own rows of x
// and dy, and, where x has too few rows for all threads, its own rows of the mask. The rows of x are cut into parts by
// the shape and the mask alone, each with its own sum, so the result does not depend on the number of threads.
template <typename T>
void sampled_gradient(const Mask& mask, const Rows& dy, const Rows& x, T* gradient) {
  const int64_t k = mask.columns, n = mask.rows, count = mask.count(), widest = 8 * kLanes;
  const int64_t parts = std::clamp<int64_t>(std::min(kPartialValues / count, x.count / widest), 1, 16);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = std::min((threads + parts - 1) / parts, (n + kBand - 1) / kBand);
  const int64_t group_rows = (n + groups - 1) / groups;
  const int64_t block = std::min(k, std::max<int64_t>(64, 8 * n * k / count));  // about 8 positions of a row
  const int32_t* columns = mask.positions();
  Buffer<T> partial((parts - 1) * count);
  const auto cut = [&](int64_t part) { return part == parts ? x.count : x.count * part / parts / widest * widest; };
  share_tasks(parts * groups, x.count * (n + k), [&](TaskQueue& queue) {
    Buffer<T> x_panel(k * widest), dy_panel(kBand * widest);
    int64_t cursor[kBand];
    for (int64_t i; queue.next(i);) {
      const int64_t part = i / groups, first = i % groups * group_rows, last = std::min(n, first + group_rows);
      T* sum = part == 0 ? gradient : partial.get() + (part - 1) * count;
      if (first >= last) continue;
      std::fill(sum + mask.offsets[first], sum + mask.offsets[last], T(0));
      for (const Panel& panel : split_rows(cut(part), cut(part + 1), widest)) {
        kernels<T>().transpose_in(x.data<T>() + panel.first * x.stride, x.stride, panel.tall, k, x_panel.get(),
                                  panel.wide);
        for (int64_t band = first; band < last; band += kBand) {
          const int64_t end = std::min(last, band + kBand);
          kernels<T>().transpose_in(dy.data<T>() + panel.first * dy.stride + band, dy.stride, panel.tall, end - band,
                                    dy_panel.get(), panel.wide);
          kernels<T>().sampled_rows[panel.level()](dy_panel.get(), x_panel.get(), band, end, k, block,
                                                   mask.offsets.data(), columns, cursor, sum);
        }
      }
    }
  });
  for (int64_t part = 0; part + 1 < parts; ++part) {
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
    sampled_gradient(mask, dy, x, gradient.get());
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

// dA [r, K], dB [N, r] in T.
template <typename T>
std::tuple<Tensor, Tensor> factor_gradients(const Mask& mask, const Rows& dy, const Rows& x, const Factors<T>& factors,
                                            T scale, Regime forced) {
  check_same_count(dy, x);
  Tensor da = torch::stable::new_empty(factors.a(), {factors.rank, mask.columns});
  Tensor db = torch::stable::new_empty(factors.b(), {mask.rows, factors.rank});
  const Regime regime = choose_gradient(forced, x.count, mask.rows, mask.columns, mask.count(), mask.occupied_tiles());
  if (regime == Regime::kWhole) {
    contract_blocks<T>(mask, factors, scale, da, db,
                       [&](auto visit) { for_each_gradient_block<T>(mask, dy, x, visit); });
  } else if (regime == Regime::kTile) {
    contract_tiles<T>(mask, dy, x, factors, scale, da, db);
  } else {
    const Buffer<T> gradient = gradient_values<T>(mask, dy, x, regime);
    contract_sparse<T>(mask, gradient.get(), factors, scale, da, db);
  }
  return {da, db};
}

// ---- the one-product mode -------------------------------------------------------------------------------------------

using Seed = std::optional<int64_t>;

// Whether a seed asks for a rounded weight: where nothing is rounded to 16 bits it changes nothing.
bool rounds(const Tensor& x, const Seed& seed) {
  return seed && (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16);
}

// W + delta rounded stochastically to the dtype of x, in fp32: outside the mask the weight is representable as it is.
Tensor round_weight(const Tensor& x, const Optional& weight, const Delta<float>& delta, int64_t seed) {
  const Mask& mask = delta.mask;
  const Tensor sum = delta.effective_weight(as_type(weight, ScalarType::Float), x);
  const int32_t* columns = mask.positions();
  const uint32_t key = rounding_key(0, seed);
  const bool fp16 = x.scalar_type() == ScalarType::Half;
  torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* row = write<float>(sum) + n * mask.columns;
      for (int64_t i = mask.offsets[n]; i < mask.offsets[n + 1]; ++i) {
        const uint32_t random = hash_bits(hash_bits(static_cast<uint32_t>(n * mask.columns + columns[i])) + key);
        float& value = row[columns[i]];
        value = fp16 ? round_stochastically<true>(value, random) : round_stochastically<false>(value, random);
      }
    }
  });
  return sum;
}

// x W'^T + bias for the rounded W', in T and rounded once.
template <typename T>
Tensor forward_rounded(const Tensor& x, const Tensor& rounded, const Optional& bias) {
  const ScalarType type = dtype_of<T>();
  return as_type(linear(as_type(x, type), as_type(rounded, type), as_type(bias, type)), x.scalar_type());
}

// dy W' for dy [..., N].
template <typename T>
Tensor input_gradient_rounded(const Tensor& dy, const Tensor& rounded) {
  const Rows rows = as_rows<T>(dy, rounded.size(0));
  const Tensor dx = empty_rows(dy, rounded.size(1), dtype_of<T>());
  matmul_out(as_two_dimensions(dx, rounded.size(1)), rows.tensor, as_type(rounded, dtype_of<T>()));
  return as_type(dx, dy.scalar_type());
}

// ---- operators ------------------------------------------------------------------------------------------------------

Tensor masked_lora_linear(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& lora_a,
                          const Tensor& lora_b, const Tensor& mask_words, const Tensor& scale, int64_t regime,
                          const Seed& seed, const Optional& rounded) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    if (rounded) return forward_rounded<T>(x, *rounded, bias);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, static_cast<T>(scalar_value(scale)));
    if constexpr (std::is_same_v<T, float>) {
      if (rounds(x, seed)) return forward_rounded<T>(x, round_weight(x, weight, delta, *seed), bias);
    }
    const Tensor y = forward(x, weight, bias, delta, Regime{regime});
    return as_type(y, x.scalar_type());
  });
}

Tensor masked_lora_linear_input_gradient(const Tensor& grad_output, const Optional& weight, const Tensor& lora_a,
                                         const Tensor& lora_b, const Tensor& mask_words, const Tensor& scale,
                                         int64_t regime, const Seed& seed, const Optional& rounded) {
  return with_compute_type(grad_output, [&](auto element) {
    using T = decltype(element);
    if (rounded) return input_gradient_rounded<T>(grad_output, *rounded);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, static_cast<T>(scalar_value(scale)));
    if constexpr (std::is_same_v<T, float>) {
      if (rounds(grad_output, seed)) {
        return input_gradient_rounded<T>(grad_output, round_weight(grad_output, weight, delta, *seed));
      }
    }
    const Tensor dx = input_gradient(grad_output, as_type(weight, dtype_of<T>()), delta, Regime{regime});
    return as_type(dx, grad_output.scalar_type());
  });
}

std::tuple<Tensor, Tensor> masked_lora_linear_factor_gradients(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& lora_a, const Tensor& lora_b,
                                                               const Tensor& mask_words, const Tensor& scale,
                                                               int64_t regime) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    const auto [da, db] = factor_gradients<T>(mask, as_rows<T>(grad_output, mask.rows), as_rows<T>(x, mask.columns),
                                              factors, static_cast<T>(scalar_value(scale)), Regime{regime});
    return std::make_tuple(as_type(da, lora_a.scalar_type()), as_type(db, lora_b.scalar_type()));
  });
}

// Contracts a dense weight gradient [N, K] (a convolution's, or the effective weight's) with the factors under the
// mask.
std::tuple<Tensor, Tensor> masked_factor_gradients(const Tensor& weight_gradient, const Tensor& lora_a,
                                                   const Tensor& lora_b, const Tensor& mask_words,
                                                   const Tensor& scale) {
  return with_compute_type(weight_gradient, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    check_matrix(weight_gradient, mask, "weight_gradient");
    const Factors<T> factors(lora_a, lora_b);
    const Tensor dense = as_dense(as_type(weight_gradient, dtype_of<T>()));
    const T factor = static_cast<T>(scalar_value(scale));
    Tensor da = torch::stable::new_empty(factors.a(), {factors.rank, mask.columns});
    Tensor db = torch::stable::new_empty(factors.b(), {mask.rows, factors.rank});
    const double size = static_cast<double>(mask.rows) * mask.columns;
    if (cost::kContract * mask.count() < (cost::kContractBlock + cost::kCopy) * size) {
      const Buffer<T> gradient = values_at<T>(mask, dense);
      contract_sparse<T>(mask, gradient.get(), factors, factor, da, db);
    } else {
      contract_blocks<T>(mask, factors, factor, da, db, [&](auto visit) {
        for (int64_t first = 0; first < mask.rows; first += kGemmRows) {
          const int64_t rows = std::min(kGemmRows, mask.rows - first);
          Tensor source = dense, block = scratch<T>(dense, rows, mask.columns);
          torch::stable::copy_(block, torch::stable::narrow(source, 0, first, rows));
          visit(first, rows, block);
        }
      });
    }
    return std::make_tuple(as_type(da, lora_a.scalar_type()), as_type(db, lora_b.scalar_type()));
  });
}

// Values given directly; their number must be the mask's.
Tensor checked_values(const Tensor& values, const Mask& mask, ScalarType dtype) {
  STD_TORCH_CHECK(values.numel() == mask.count(), "values has ", values.numel(), " elements, but the mask has ",
                  mask.count(), " set bits");
  return as_dense(as_type(values, dtype));
}

Tensor masked_values_linear(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& values,
                            const Tensor& mask_words, const Tensor& scale, int64_t regime, const Seed& seed,
                            const Optional& rounded) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    if (rounded) return forward_rounded<T>(x, *rounded, bias);
    const Mask mask(mask_words, mask_words.size(0), x.size(x.dim() - 1));
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    const Delta<T> delta(mask, read<T>(dense), static_cast<T>(scalar_value(scale)));
    if constexpr (std::is_same_v<T, float>) {
      if (rounds(x, seed)) return forward_rounded<T>(x, round_weight(x, weight, delta, *seed), bias);
    }
    const Tensor y = forward(x, weight, bias, delta, Regime{regime});
    return as_type(y, x.scalar_type());
  });
}

Tensor masked_values_linear_input_gradient(const Tensor& grad_output, const Optional& weight, const Tensor& values,
                                           const Tensor& mask_words, const Tensor& scale, int64_t in_features,
                                           int64_t regime, const Seed& seed, const Optional& rounded) {
  return with_compute_type(grad_output, [&](auto element) {
    using T = decltype(element);
    if (rounded) return input_gradient_rounded<T>(grad_output, *rounded);
    const Mask mask(mask_words, mask_words.size(0), in_features);
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    const Delta<T> delta(mask, read<T>(dense), static_cast<T>(scalar_value(scale)));
    if constexpr (std::is_same_v<T, float>) {
      if (rounds(grad_output, seed)) {
        return input_gradient_rounded<T>(grad_output, round_weight(grad_output, weight, delta, *seed));
      }
    }
    const Tensor dx = input_gradient(grad_output, as_type(weight, dtype_of<T>()), delta, Regime{regime});
    return as_type(dx, grad_output.scalar_type());
  });
}

Tensor masked_values_linear_gradient(const Tensor& grad_output, const Tensor& x, const Tensor& values,
                                     const Tensor& mask_words, const Tensor& scale, int64_t regime) {
  return with_compute_type(x, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, mask_words.size(0), x.size(x.dim() - 1));
    const Rows dy = as_rows<T>(grad_output, mask.rows), rows = as_rows<T>(x, mask.columns);
    const Regime chosen =
        choose_gradient(Regime{regime}, rows.count, mask.rows, mask.columns, mask.count(), mask.occupied_tiles());
    const Buffer<T> gradient = gradient_values<T>(mask, dy, rows, chosen);
    Tensor result = torch::stable::new_empty(values, {values.numel()}, dtype_of<T>());
    STD_TORCH_CHECK(values.numel() == mask.count(), "values has ", values.numel(), " elements, but the mask has ",
                    mask.count(), " set bits");
    T* out = write<T>(result);
    std::copy_n(gradient.get(), mask.count(), out);
    scale_all(out, mask.count(), static_cast<T>(scalar_value(scale)));
    return as_type(result, values.scalar_type());
  });
}

Tensor masked_factor_values(const Tensor& lora_a, const Tensor& lora_b, const Tensor& mask_words, int64_t count) {
  return with_compute_type(lora_a, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    STD_TORCH_CHECK(count == mask.count(), "count is ", count, ", but the mask has ", mask.count(), " set bits");
    const Factors<T> factors(lora_a, lora_b);
    const Delta<T> delta(mask, factors, T(1));
    Tensor values = torch::stable::new_empty(lora_a, {count}, dtype_of<T>());
    torch::stable::parallel_for(0, mask.rows, mask.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) delta.row(n, write<T>(values) + mask.offsets[n]);
    });
    return values;
  });
}

// out = weight + delta in the compute type, rounded once to out's dtype. out may be the weight itself.
template <typename T>
void store_effective_weight(const Tensor& out, const Optional& weight, const Delta<T>& delta) {
  check_matrix(out, delta.mask, "out");
  if (weight) check_matrix(*weight, delta.mask, "weight");
  if (out.scalar_type() != dtype_of<T>() || !out.is_contiguous()) {
    Tensor target = out;
    torch::stable::copy_(target, delta.effective_weight(weight, out));
    return;
  }
  const Tensor dense = weight ? as_dense(as_type(*weight, dtype_of<T>())) : out;
  delta.add_to(weight ? read<T>(dense) : nullptr, write<T>(out));
}

void effective_weight_out(Tensor out, const Optional& weight, const Tensor& lora_a, const Tensor& lora_b,
                          const Tensor& mask_words, const Tensor& scale) {
  with_compute_type(out, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, lora_b.size(0), lora_a.size(1));
    const Factors<T> factors(lora_a, lora_b);
    store_effective_weight(out, weight, Delta<T>(mask, factors, static_cast<T>(scalar_value(scale))));
  });
}

Tensor effective_weight(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Tensor& mask_words,
                        const Tensor& scale) {
  const Tensor out = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  effective_weight_out(out, weight, lora_a, lora_b, mask_words, scale);
  return out;
}

void effective_weight_from_values_out(Tensor out, const Optional& weight, const Tensor& values,
                                      const Tensor& mask_words, const Tensor& scale) {
  with_compute_type(out, [&](auto element) {
    using T = decltype(element);
    const Mask mask(mask_words, out.size(0), out.size(1));
    const Tensor dense = checked_values(values, mask, dtype_of<T>());
    store_effective_weight(out, weight, Delta<T>(mask, read<T>(dense), static_cast<T>(scalar_value(scale))));
  });
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m) {
  m.impl("masked_lora_linear", TORCH_BOX(&fade::masked_lora_linear));
  m.impl("masked_lora_linear_input_gradient", TORCH_BOX(&fade::masked_lora_linear_input_gradient));
  m.impl("masked_lora_linear_factor_gradients", TORCH_BOX(&fade::masked_lora_linear_factor_gradients));
  m.impl("masked_factor_gradients", TORCH_BOX(&fade::masked_factor_gradients));
  m.impl("masked_values_linear", TORCH_BOX(&fade::masked_values_linear));
  m.impl("masked_values_linear_input_gradient", TORCH_BOX(&fade::masked_values_linear_input_gradient));
  m.impl("masked_values_linear_gradient", TORCH_BOX(&fade::masked_values_linear_gradient));
  m.impl("masked_factor_values", TORCH_BOX(&fade::masked_factor_values));
  m.impl("effective_weight", TORCH_BOX(&fade::effective_weight));
  m.impl("effective_weight_out", TORCH_BOX(&fade::effective_weight_out));
  m.impl("effective_weight_from_values_out", TORCH_BOX(&fade::effective_weight_from_values_out));
}
