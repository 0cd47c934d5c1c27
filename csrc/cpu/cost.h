// How long the ways of computing masked LoRA take on a CPU, by measurement, and the choices that follow.
#pragma once

#include <cstdint>

#include "cpu/masked_lora_kernels.h"

namespace fade {

// What a caller may force; kAuto takes the cheapest by the table. Products know only gather and, for the others, the
// effective weight. The numbers are those of REGIMES in fade_kernels/masked_lora.py.
enum class Regime : int64_t { kAuto, kGather, kTile, kWhole };

// Nanoseconds of one core per unit named, measured on an AMD EPYC (Zen 4 at 2.6 GHz, AVX-512, fp32, r = 16) with the
// shapes of bench/shapes.py; only their ratios matter. In brackets: the shape and the densities they were fitted to.
namespace cost {
constexpr double kGemm = 0.0215;        // multiply-add in torch's BLAS, T N K [all shapes: 0.0207 to 0.0240]
constexpr double kCopy = 0.40;          // element of W copied to scratch and read back, N K [T 64, N K 1280, 1 %]
constexpr double kScatter = 2.0;        // value added to the scratch at a position [T 256, N K 1280, 10 %]
constexpr double kScatterFilled = 0.3;  // the same where whole words are set [T 256, N K 1280, 100 %]
constexpr double kTranspose = 0.30;     // element of x, y, dy or dx to or from a panel [T 4096, N K 320, 1 %]
constexpr double kRows = 0.033;         // multiply-add of a gather product, T nnz [T 4096, N K 320, 10 %]
constexpr double kSort = 3.0;           // value sorted by its column [an estimate]
constexpr double kSampled = 0.045;      // multiply-add of the sampled product, T nnz [T 256, N K 1280, 10 %]
constexpr double kTiles = 0.027;        // multiply-add of the tile kernel, 1024 T tiles [T 4096, N K 320, 20 %]
constexpr double kContract = 3.4;       // value decoded and contracted with A and B [N K 1280, 100 %]
constexpr double kContractTile = 1.2;   // element of a tile masked and contracted [T 64, N K 1280, 20 %]
constexpr double kContractBlock = 1.0;  // element of a dense gradient masked and contracted [T 64, N K 1280, 100 %]
}  // namespace cost

enum class Product { kGather, kEffectiveWeight };

// `prepare`: what the gather product costs for each value beforehand; `filled` says whether the mask's occupied words
// are well filled; `transposed`: the columns of panels that only this product needs.
inline Product choose_product(Regime forced, bool has_weight, bool filled, int64_t t, int64_t n, int64_t k,
                              int64_t nonzeros, double prepare, int64_t transposed) {
  if (forced == Regime::kGather) return Product::kGather;
  if (forced != Regime::kAuto) return Product::kEffectiveWeight;
  const double base = has_weight ? 0.0 : cost::kGemm * t * n * k;  // without W, the GEMM exists only for the delta
  const double effective = base + cost::kCopy * n * k + (filled ? cost::kScatterFilled : cost::kScatter) * nonzeros;
  const double gather = cost::kTranspose * t * transposed + (cost::kRows * t + prepare) * nonzeros;
  return gather < effective ? Product::kGather : Product::kEffectiveWeight;
}

inline Regime choose_gradient(Regime forced, int64_t t, int64_t n, int64_t k, int64_t nonzeros, int64_t tiles) {
  if (forced != Regime::kAuto) return forced;
  const double gather = cost::kTranspose * t * (n + k) + (cost::kSampled * t + cost::kContract) * nonzeros;
  const double tile = (cost::kTiles * t + cost::kContractTile) * tiles * kTile * kTile;
  const double whole = cost::kGemm * t * n * k + cost::kContractBlock * n * k;
  if (gather <= tile && gather <= whole) return Regime::kGather;
  return tile <= whole ? Regime::kTile : Regime::kWhole;
}

}  // namespace fade
