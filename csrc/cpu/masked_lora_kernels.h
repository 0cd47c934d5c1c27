// The inner loops of masked LoRA as one table for each instruction set, and the choice among them at run time. Loops:
// masked_lora_simd.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "common/bitmask.h"

namespace fade {

constexpr int64_t kLanes = 16;  // elements of a vector in masked_lora_simd.h, whatever the instruction set
constexpr int64_t kTile = 32;   // rows and columns of a tile; one mask word wide

// The inner loops for one instruction set; the arrays are indexed by log2 of the panel's vectors: 1, 2, 4, 8.
template <typename T>
struct Kernels {
  int64_t (*count_rows)(const uint32_t* words, int64_t rows, int64_t width, int64_t* counts);
  void (*decode)(const uint32_t* words, int64_t first, int64_t last, int64_t width, int64_t count, int32_t* columns);
  void (*clear_outside)(const uint32_t* words, int64_t columns, T* row);
  void (*scatter_add_at)(const int32_t* columns, int64_t count, const T* values, T scale, T* row);
  void (*scatter_add)(const uint32_t* words, int64_t width, const T* values, T scale, T* row);
  void (*factor_values_at)(const int32_t* columns, int64_t count, const T* a_t, const T* b, int64_t rp, T* values);
  void (*factor_values)(const uint32_t* words, int64_t width, const T* a_padded, const T* b, int64_t r, T* values);
  void (*transpose_in)(const T* x, int64_t stride, int64_t tall, int64_t columns, T* panel, int64_t wide);
  void (*transpose_add)(const T* panel, int64_t wide, int64_t tall, int64_t columns, T* y, int64_t stride);
  void (*product_rows[4])(const T* x_panel, int64_t begin, int64_t end, const int64_t* offsets, const int32_t* columns,
                          const T* values, T* y_panel);
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

}  // namespace fade
