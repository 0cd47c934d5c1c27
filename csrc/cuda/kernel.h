// What every CUDA kernel file needs: launches on the current stream of a tensor's device, tables of many tensors passed
// as kernel arguments, and scans within a block. Kernels register themselves with
// STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CUDA, m); their schemas live in fade_kernels/_ops.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/macros.h"
#include "common/tensor.h"

namespace fade {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Blocks of kernels that loop over their work: enough to fill any GPU several times over.
constexpr int64_t kMaxBlocks = 8192;

// Bytes of arguments every driver and toolkit takes; more needs CUDA 12.1 on both sides.
constexpr size_t kMaxArgumentBytes = 4096;

// Shared memory that a block gets without asking for more.
constexpr int64_t kSharedBytesOfAnyBlock = 48 * 1024;

// The architectures this library holds code for, e.g. "8.0, 9.0" (build_info.cu).
std::string architectures();

inline bool same_cuda_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The device of a tensor made current for as long as this lives, and launches on its current stream: work is only
// enqueued, so that it can be captured into a CUDA graph.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(index_of(tensor)), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int64_t multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // Shared memory that a block may have.
  int64_t shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
              const Arguments&... arguments) const {
    launch_with_shared(name, kernel, blocks, threads, 0, arguments...);
  }

  // The same for a kernel that declares `extern __shared__` memory, of which its blocks get so many bytes.
  template <typename... Parameters, typename... Arguments>
  void launch_with_shared(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                          int64_t shared_bytes, const Arguments&... arguments) const {
    if (blocks == 0) return;
    if (shared_bytes > kSharedBytesOfAnyBlock) {
      // Always all that the device has left: another thread may launch the same kernel with more at this moment.
      const auto* function = reinterpret_cast<const void*>(kernel);
      cudaFuncAttributes own{};
      check(cudaFuncGetAttributes(&own, function), name);
      const auto most = static_cast<int>(this->shared_bytes() - static_cast<int64_t>(own.sharedSizeBytes));
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
      // All of L1 as shared memory, without which a second block may find no room beside the first.
      check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared),
            name);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    const cudaError_t pending = cudaGetLastError();  // clears what the launch left
    check(launched != cudaSuccess ? launched : pending, name);
  }

  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion, what,
                    ": the CUDA kernels of fade_kernels were built for compute capability ", architectures(),
                    ", which this GPU or its driver cannot run: rebuild with TORCH_CUDA_ARCH_LIST set to its "
                    "capability, or set FADE_KERNELS=reference for the definitions in plain PyTorch");
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  }

 private:
  int64_t attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index_), "cudaDeviceGetAttribute");
    return value;
  }

  static torch::stable::accelerator::DeviceIndex index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "a CUDA kernel of fade_kernels got a tensor that is not on a CUDA device");
    return tensor.get_device_index();
  }

  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Many tensors cut into chunks, one launch for as many as fit into the kernel's arguments: nothing is copied to the
// device, so a launch can be captured. Blocks find their tensor by bisection, so that a tensor may have any number of
// chunks. Entry: what the kernel needs to know of a tensor, with a member int64_t end, the number of chunks up to and
// including this tensor's.
template <typename Entry>
struct Table {
  static constexpr size_t kHeaderBytes = 2 * sizeof(int64_t);
  static constexpr size_t kOtherArguments = 64;
  static constexpr int kCapacity = (kMaxArgumentBytes - kHeaderBytes - kOtherArguments) / sizeof(Entry);

  int64_t first_chunk;  // of entry 0 among all chunks
  int64_t size;
  Entry entries[kCapacity];

  FADE_HOST_DEVICE int64_t begin(int64_t i) const { return i == 0 ? 0 : entries[i - 1].end; }
  FADE_HOST_DEVICE int64_t chunks() const { return size == 0 ? 0 : entries[size - 1].end; }

  // The entry that holds a chunk.
  FADE_HOST_DEVICE int64_t find(int64_t chunk) const {
    int64_t low = 0, high = size - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (chunk < entries[middle].end) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// Tables of all entries; chunks_of says how many chunks an entry has. Entries without chunks are left out.
template <typename Entry, typename ChunksOf>
std::vector<Table<Entry>> make_tables(const std::vector<Entry>& entries, ChunksOf chunks_of) {
  std::vector<Table<Entry>> tables;
  int64_t chunk = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    const int64_t chunks = chunks_of(entries[i]);
    if (chunks == 0) continue;
    const bool full = !tables.empty() && tables.back().size == Table<Entry>::kCapacity;
    if (tables.empty() || full) tables.push_back(Table<Entry>{chunk, 0, {}});
    Table<Entry>& table = tables.back();
    Entry& entry = table.entries[table.size] = entries[i];
    entry.end = table.chunks() + chunks;
    ++table.size;
    chunk += chunks;
  }
  return tables;
}

// The sum over the lanes of a warp, in lane 0.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  return value;
}

// The sum over the lanes up to and including this one.
template <typename T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
  const int lane = threadIdx.x % kWarpSize;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// The sum over the threads of the block before this one; all of them must take part.
template <typename T>
__device__ __forceinline__ T block_exclusive_scan(T value) {
  __shared__ T sums[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const T inclusive = warp_inclusive_scan(value);
  if (lane == kWarpSize - 1) sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const T sum = lane < warps ? sums[lane] : T{0};
    const T through = warp_inclusive_scan(sum);
    if (lane < warps) sums[lane] = through - sum;
  }
  __syncthreads();
  const T before = sums[warp] + inclusive - value;
  __syncthreads();  // the sums may be overwritten by the next scan
  return before;
}

}  // namespace fade
