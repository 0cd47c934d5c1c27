// Saliency accumulators on CUDA: S += |g|, g or g^2 over many tensors in one launch. Streaming, so all that matters is
// that every element is read and written once, 16 bytes at a time. Definition: fade_kernels/reference.py; the
// arithmetic of one element: common/magnitude.h.
#include "common/dtype.h"
#include "common/magnitude.h"
#include "cuda/kernel.h"

namespace fade {
namespace {

// Elements of one block: small enough that a layer of 320 x 320 occupies 25 multiprocessors.
constexpr int kChunkElements = 4096;
constexpr int kAccess = 16;  // bytes

enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

struct Pair {
  float* saliency;
  const void* gradient;
  int64_t elements;
  int64_t end;  // of Table
  Dtype dtype;
};

// Elements before both pointers are aligned to an access, `limit` where they never are together.
__device__ __forceinline__ int aligned_head(const void* saliency, const void* gradient, int gradient_bytes, int limit) {
  const auto s = reinterpret_cast<uintptr_t>(saliency), g = reinterpret_cast<uintptr_t>(gradient);
  for (int head = 0; head < kAccess; ++head) {
    const bool aligned = (s + head * sizeof(float)) % kAccess == 0 && (g + head * gradient_bytes) % kAccess == 0;
    if (aligned) return min(head, limit);
  }
  return limit;
}

template <Magnitude mode, typename T>
__device__ __forceinline__ void fold(float* __restrict__ saliency, const T* __restrict__ gradient, int n) {
  constexpr int kVector = kAccess / (sizeof(T) < sizeof(float) ? sizeof(T) : sizeof(float));  // elements a step
  constexpr int kStep = kThreads * kVector;
  const int head = aligned_head(saliency, gradient, sizeof(T), n);
  const int vectors = (n - head) / kVector, tail = head + vectors * kVector;

  for (int i = threadIdx.x; i < head; i += kThreads) saliency[i] += contribution<mode>(to_float(gradient[i]));
  for (int i = tail + threadIdx.x; i < n; i += kThreads) saliency[i] += contribution<mode>(to_float(gradient[i]));

  // All loads of a thread's share of the chunk come before its first store, so that they are in flight together.
  constexpr int kSteps = kChunkElements / kStep;
  uint4 raw_g[kSteps][kVector * sizeof(T) / kAccess], raw_s[kSteps][kVector * sizeof(float) / kAccess];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = head + step * kStep + threadIdx.x * kVector;
    if (i < tail) {
      const auto* p_g = reinterpret_cast<const uint4*>(gradient + i);
      const auto* p_s = reinterpret_cast<const uint4*>(saliency + i);
#pragma unroll
      for (size_t j = 0; j < kVector * sizeof(T) / kAccess; ++j) raw_g[step][j] = p_g[j];
#pragma unroll
      for (size_t j = 0; j < kVector * sizeof(float) / kAccess; ++j) raw_s[step][j] = p_s[j];
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = head + step * kStep + threadIdx.x * kVector;
    if (i < tail) {
      T g[kVector];
      float s[kVector];
      memcpy(g, raw_g[step], sizeof(g));
      memcpy(s, raw_s[step], sizeof(s));
#pragma unroll
      for (int j = 0; j < kVector; ++j) s[j] += contribution<mode>(to_float(g[j]));
      memcpy(raw_s[step], s, sizeof(s));
      auto* p_s = reinterpret_cast<uint4*>(saliency + i);
#pragma unroll
      for (size_t j = 0; j < kVector * sizeof(float) / kAccess; ++j) p_s[j] = raw_s[step][j];
    }
  }
}

// One block per chunk.
template <Magnitude mode>
__global__ void __launch_bounds__(kThreads) accumulate(const __grid_constant__ Table<Pair> table) {
  const int64_t i = table.find(blockIdx.x);
  const Pair& pair = table.entries[i];
  const int64_t begin = (blockIdx.x - table.begin(i)) * kChunkElements;
  const int n = static_cast<int>(min(pair.elements - begin, static_cast<int64_t>(kChunkElements)));
  float* saliency = pair.saliency + begin;
  switch (pair.dtype) {
    case Dtype::kFloat: return fold<mode>(saliency, static_cast<const float*>(pair.gradient) + begin, n);
    case Dtype::kDouble: return fold<mode>(saliency, static_cast<const double*>(pair.gradient) + begin, n);
    case Dtype::kHalf: return fold<mode>(saliency, static_cast<const Half*>(pair.gradient) + begin, n);
    case Dtype::kBFloat16: return fold<mode>(saliency, static_cast<const BFloat16*>(pair.gradient) + begin, n);
  }
}

Dtype dtype_of(const Tensor& gradient) {
  switch (gradient.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: STD_TORCH_CHECK(false, "gradients must be float32, float64, float16 or bfloat16");
  }
}

bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// Whether both tensors lie in memory without gaps and in the same order: position i of one is then that of the other.
bool same_dense_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> order;  // stride, size
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) == 1) continue;
    if (a.stride(d) != b.stride(d)) return false;
    order.emplace_back(a.stride(d), a.size(d));
  }
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : order) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void accumulate_on_device(const std::vector<Pair>& pairs, const Tensor& any, const std::string& mode) {
  const Device device(any);
  const auto chunks = [](const Pair& pair) { return (pair.elements + kChunkElements - 1) / kChunkElements; };
  for (const Table<Pair>& table : make_tables(pairs, chunks)) {
    const auto kernel = mode == "abs"      ? accumulate<Magnitude::kAbs>
                        : mode == "signed" ? accumulate<Magnitude::kSigned>
                                           : accumulate<Magnitude::kSquare>;
    device.launch("accumulate_gradient_magnitude_", kernel, table.chunks(), kThreads, table);
  }
}

void accumulate_gradient_magnitude_(std::vector<Tensor> saliency, std::vector<Tensor> gradient, std::string mode) {
  STD_TORCH_CHECK(saliency.size() == gradient.size(), "one gradient per accumulator is needed");
  STD_TORCH_CHECK(mode == "abs" || mode == "signed" || mode == "square", "mode must be abs, signed or square, not ",
                  mode);
  std::vector<InPlace> strided;
  std::vector<Tensor> copies;  // of strided gradients: alive until their launch is enqueued
  std::vector<Pair> pairs;
  for (size_t i = 0; i < saliency.size(); ++i) {
    const Tensor &s = saliency[i], &g = gradient[i];
    STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float, "saliency[", i, "] must be float32");
    STD_TORCH_CHECK(same_shape(s, g), "gradient[", i, "] and saliency[", i, "] differ in shape");
    STD_TORCH_CHECK(same_cuda_device(s, g), "gradient[", i, "] and saliency[", i, "] are not on one CUDA device");
    if (same_dense_layout(s, g)) {
      pairs.push_back({write<float>(s), g.const_data_ptr(), s.numel(), 0, dtype_of(g)});
    } else {
      copies.push_back(as_dense(g));
      strided.emplace_back(s);
      float* target = write<float>(strided.back().dense());
      pairs.push_back({target, copies.back().const_data_ptr(), s.numel(), 0, dtype_of(g)});
    }
    const bool last_of_device = i + 1 == saliency.size() || !same_cuda_device(saliency[i + 1], s);
    if (last_of_device) {
      accumulate_on_device(pairs, s, mode);
      for (InPlace& target : strided) target.store();
      pairs.clear();
      strided.clear();
      copies.clear();
    }
  }
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CUDA, m) {
  m.impl("accumulate_gradient_magnitude_", TORCH_BOX(&fade::accumulate_gradient_magnitude_));
}
