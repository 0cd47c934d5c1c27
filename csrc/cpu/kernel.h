// What every CPU kernel file needs from torch and from the compiler: the attribute that compiles a function for several
// x86-64 levels, grain sizes, torch's matrix product. Kernels register themselves with
// STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m); their schemas live in fade_kernels/_ops.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/tensor.h"

// One source, one binary: the loader picks AVX-512, AVX2 or the portable baseline at run time (glibc's ifunc). Put it on
// leaf functions that hold the loop; lambdas and calls inside are compiled for the same level only when inlined.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FADE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FADE_HAS_CPU_CLONES 1
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__clang__) && __clang_major__ >= 17
#define FADE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FADE_HAS_CPU_CLONES 1
#else
#define FADE_CPU_CLONES
#define FADE_HAS_CPU_CLONES 0
#endif

namespace fade {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainSize = 32768;

// out[rows, columns] = a @ b (fp32, existing memory), through torch's own BLAS.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned handle, so that it is released
}

}  // namespace fade
