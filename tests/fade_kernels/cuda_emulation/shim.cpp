// What libtorch's CUDA half would offer to the library: one device, which is the CPU. Linked into the emulated library,
// where its definitions come before libtorch's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}
