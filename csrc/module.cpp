// The Python module fade_kernels._C: importing it loads the shared library, whose static initialisers register the CPU
// kernels of csrc/cpu; what it offers itself are only facts about the build. pybind11; operators go through torch.ops.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernel.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// The level the loader chose for functions marked FADE_CPU_CLONES.
std::string cpu_capability() {
#if FADE_HAS_CPU_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512 (x86-64-v4)";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2 (x86-64-v3)";
#endif
  return "baseline";
}

std::string torch_target() {
  return std::to_string((TORCH_TARGET_VERSION >> 56) & 0xFF) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xFF);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of the fade_kernels operators and facts about how they were built.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = compiler();
        info["torch_target"] = torch_target();
        info["cpu_capability"] = cpu_capability();
        info["threads"] = torch::stable::get_num_threads();
        return info;
      },
      "Compiler, oldest torch version served, instruction set in use and number of threads.");
}
