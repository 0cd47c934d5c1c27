// What CPU and CUDA translation units share about the compiler: the annotation of functions that run on both, and
// nothing about torch. Apart from the functors so that each of them includes only this.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FADE_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FADE_HOST_DEVICE __forceinline
#else
#define FADE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fade {

template <typename To, typename From>
FADE_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace fade
