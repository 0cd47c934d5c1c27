// Facts about how the CUDA library was built, for fade_kernels.build_info() and for error messages.
#include <cuda_runtime.h>

#include <string>

namespace fade {

std::string architectures() {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // e.g. 800, 900
  std::string list;
  for (const int architecture : kArchitectures) {
    if (!list.empty()) list += ", ";
    list += std::to_string(architecture / 100) + "." + std::to_string(architecture / 10 % 10);
  }
  return list;
}

}  // namespace fade

extern "C" __attribute__((visibility("default"))) const char* fade_cuda_architectures() {
  static const std::string list = fade::architectures();
  return list.c_str();
}

// As CUDART_VERSION, e.g. 13000.
extern "C" __attribute__((visibility("default"))) int fade_cuda_version() { return CUDART_VERSION; }
