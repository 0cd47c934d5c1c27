// The part of CUDA that csrc/cuda uses, on the CPU: a g++ that finds this file in place of the toolkit's cuda_runtime.h
// compiles the kernels unchanged. Blocks run one after the other, forwards in one launch and backwards in the next; the
// threads of a block are coroutines, switched at barriers and at exchanges within a warp. For tests of what kernels
// compute on machines without a GPU: it says nothing about speed and finds few races. A barrier or exchange that not
// all threads reach is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH_LIST__ 800, 900
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

// A coroutine, kept from block to block. ucontext only starts it: later switches jump, which needs no system call.
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf state;
  bool finished;
};

struct Warp {
  int arrived = 0, lanes = 0;
  unsigned generation = 0;
  uint64_t values[2][32];
};

constexpr size_t kStackBytes = 128 * 1024;

struct Machine {
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::function<void()> body;
  unsigned thread = 0;
  int threads = 0, running = 0, at_barrier = 0;
  unsigned barrier_generation = 0;
  long long progress = 0;
};

inline Machine machine;

}  // namespace emulation

inline dim3 gridDim, blockDim, blockIdx;
struct ThreadIndex {
  struct X {
    operator unsigned() const { return emulation::machine.thread; }
  } x;
};
inline constexpr ThreadIndex threadIdx;

namespace emulation {

inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, machine.thread);
  std::abort();
}

inline void yield() {
  if (_setjmp(machine.fibers[machine.thread].state) == 0) _longjmp(machine.scheduler, 1);
}

inline void run_threads() {
  for (;;) {
    machine.body();
    ++machine.progress;
    --machine.running;
    machine.fibers[machine.thread].finished = true;
    yield();
  }
}

inline void start_or_resume(unsigned thread) {
  machine.thread = thread;
  Fiber& fiber = machine.fibers[thread];
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.state, 1);
  fiber.stack = std::make_unique<char[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  setcontext(&context);
}

inline void run_block(int threads) {
  machine.threads = machine.running = threads;
  machine.at_barrier = 0;
  machine.warps.assign((threads + 31) / 32, Warp{});
  if (machine.fibers.empty()) machine.fibers.resize(1024);  // the most threads a block may have
  for (int t = 0; t < threads; ++t) {
    machine.fibers[t].finished = false;
    ++machine.warps[t / 32].lanes;
  }
  while (machine.running > 0) {
    const long long before = machine.progress;
    for (int t = 0; t < threads; ++t) {
      if (!machine.fibers[t].finished) start_or_resume(t);
    }
    if (machine.progress == before) fail("threads wait at a barrier or in a warp that others never reach");
  }
}

// The values of all lanes of this thread's warp. All lanes must take part.
inline const uint64_t* exchange(uint64_t value) {
  Warp& warp = machine.warps[machine.thread / 32];
  const unsigned generation = warp.generation;
  warp.values[generation & 1][machine.thread % 32] = value;
  ++machine.progress;
  if (++warp.arrived == warp.lanes) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) yield();
  }
  return warp.values[generation & 1];
}

template <typename T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

}  // namespace emulation

inline void __syncthreads() {
  auto& machine = emulation::machine;
  const unsigned generation = machine.barrier_generation;
  ++machine.progress;
  if (++machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    ++machine.barrier_generation;
  } else {
    while (machine.barrier_generation == generation) emulation::yield();
  }
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* values = emulation::exchange(predicate);
  unsigned word = 0;
  for (int lane = 0; lane < 32; ++lane) word |= static_cast<unsigned>(values[lane] & 1) << lane;
  return word;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_word<T>(emulation::exchange(emulation::to_word(value))[lane & 31]);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x % 32, source = lane + step < 32 ? lane + step : lane;
  return emulation::from_word<T>(emulation::exchange(emulation::to_word(value))[source]);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x % 32, source = lane >= step ? lane - step : lane;
  return emulation::from_word<T>(emulation::exchange(emulation::to_word(value))[source]);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  const int source = threadIdx.x % 32 ^ lanes;
  return emulation::from_word<T>(emulation::exchange(emulation::to_word(value))[source]);
}

inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T, typename U>
T atomicAdd(T* target, U value) {
  const T old = *target;
  *target += value;
  return old;
}

template <typename T, typename U>
T atomicMax(T* target, U value) {
  const T old = *target;
  if (old < value) *target = value;
  return old;
}

template <typename T, typename U>
T atomicMin(T* target, U value) {
  const T old = *target;
  if (value < old) *target = value;
  return old;
}

// Of a block that asks for more than every block has; few, so that small shapes meet the limit.
constexpr size_t kDynamicSharedBytes = 64 * 1024;

// --- the runtime -----------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel arguments are limited to 4 KiB");
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulation::machine.body = [&] { kernel(arguments...); };
  if (config->dynamicSmemBytes > kDynamicSharedBytes) emulation::fail("more shared memory than a block may have");
  static bool backwards = false;
  backwards = !backwards;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(backwards ? gridDim.x - 1 - block : block);
    emulation::run_block(blockDim.x);
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "none"; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? 3 : static_cast<int>(kDynamicSharedBytes);
  return cudaSuccess;
}
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
