// What masked LoRA's CPU kernels compute with and on: scratch memory, tasks for threads, tensors as batches of rows and
// as transposed panels.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/masked_lora_kernels.h"

namespace fade {

using Optional = std::optional<Tensor>;

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
inline Tensor scratch(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype, int64_t element_bytes) {
  constexpr int64_t kKept = 64 << 20;                    // bytes
  thread_local Buffer<char>* kept = new Buffer<char>();  // never freed: a thread may end after torch does
  thread_local int64_t kept_bytes = 0;
  const int64_t bytes = rows * columns * element_bytes;
  if (bytes > kKept) return torch::stable::new_empty(like, {rows, columns}, dtype);
  if (bytes > kept_bytes || !kept->get()) {
    *kept = Buffer<char>(bytes);
    kept_bytes = bytes;
  }
  return torch::stable::from_blob(kept->get(), {rows, columns}, {columns, 1}, like.device(), dtype);
}

template <typename T>
Tensor scratch(const Tensor& like, int64_t rows, int64_t columns) {
  return scratch(like, rows, columns, dtype_of<T>(), sizeof(T));
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

inline Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor as_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

inline Optional as_type(const Optional& tensor, ScalarType dtype) {
  return tensor ? Optional(as_type(*tensor, dtype)) : Optional();
}

// fp64 is computed in fp64; everything else in fp32, so that a small delta is not lost in a 16-bit weight.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename Call>
auto with_compute_type(const Tensor& x, Call call) {
  return compute_type(x) == ScalarType::Double ? call(double{}) : call(float{});
}

inline double scalar_value(const Tensor& scale) {
  if (scale.scalar_type() == ScalarType::Float) return *read<float>(scale);
  return *read<double>(as_type(scale, ScalarType::Double));
}

// Product of all dimensions but the last.
inline int64_t row_count(const Tensor& x) {
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

inline void check_same_count(const Rows& dy, const Rows& x) {
  STD_TORCH_CHECK(dy.count == x.count, "dy has ", dy.count, " rows, x ", x.count);
}

// [..., columns] with the leading dimensions of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t columns, ScalarType dtype) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = columns;
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor as_two_dimensions(const Tensor& rows, int64_t columns) {
  return rows.dim() == 2 ? rows : torch::stable::view(rows, {row_count(rows), columns});
}

// A block of rows transposed to [columns, wide]; wide is 16, 32, 64 or 128 and at least tall.
struct Panel {
  int64_t first, tall, wide;
  int level() const { return wide == 8 * kLanes ? 3 : wide == 4 * kLanes ? 2 : wide == 2 * kLanes ? 1 : 0; }
};

// Full panels of `widest` rows, then ever narrower ones: at most 15 rows of padding in all.
inline std::vector<Panel> split_rows(int64_t begin, int64_t end, int64_t widest) {
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

}  // namespace fade
