// Saliency accumulators on the CPU: S += |g|, g or g^2 over many tensors at once, and the same for a linear layer's weight
// gradient dY^T X, formed a block of rows at a time so that it never exists as a whole. Definitions:
// fade_kernels/reference.py; the arithmetic of one element: common/magnitude.h.
#include <algorithm>

#include "common/dtype.h"
#include "common/magnitude.h"
#include "cpu/kernel.h"

namespace fade {
namespace {

// Floats of weight gradient that exist at a time: 2 MiB, which stays in cache between the GEMM and the fold, while its
// rows are many enough to keep the GEMM at full speed for the widest layers.
constexpr int64_t kBlockElements = 1 << 19;
constexpr int64_t kMinBlockRows = 32;

template <Magnitude mode, typename T>
FADE_CPU_CLONES void fold(float* saliency, const void* gradient, int64_t begin, int64_t end) {
  const T* g = static_cast<const T*>(gradient);
  for (int64_t i = begin; i < end; ++i) saliency[i] += contribution<mode>(to_float(g[i]));
}

// Folds elements [begin, end) of a gradient into an accumulator.
using Fold = void (*)(float* saliency, const void* gradient, int64_t begin, int64_t end);

template <Magnitude mode>
Fold fold_of_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return fold<mode, float>;
    case ScalarType::Double: return fold<mode, double>;
    case ScalarType::Half: return fold<mode, Half>;
    case ScalarType::BFloat16: return fold<mode, BFloat16>;
    default: STD_TORCH_CHECK(false, "gradients must be float32, float64, float16 or bfloat16");
  }
}

Fold choose_fold(const std::string& mode, ScalarType dtype) {
  if (mode == "abs") return fold_of_dtype<Magnitude::kAbs>(dtype);
  if (mode == "signed") return fold_of_dtype<Magnitude::kSigned>(dtype);
  STD_TORCH_CHECK(mode == "square", "mode must be abs, signed or square, not ", mode);
  return fold_of_dtype<Magnitude::kSquare>(dtype);
}

void check_accumulator(const Tensor& saliency) {
  STD_TORCH_CHECK(saliency.scalar_type() == ScalarType::Float, "saliency accumulators must be float32");
}

void accumulate_gradient_magnitude_(std::vector<Tensor> saliency, std::vector<Tensor> gradient, std::string mode) {
  STD_TORCH_CHECK(saliency.size() == gradient.size(), "one gradient per accumulator is needed");
  std::vector<InPlace> targets;
  std::vector<Tensor> sources;
  std::vector<Fold> folds;
  std::vector<int64_t> ends;  // of each tensor, in elements counted over all of them
  int64_t total = 0;
  for (size_t i = 0; i < saliency.size(); ++i) {
    check_accumulator(saliency[i]);
    STD_TORCH_CHECK(saliency[i].numel() == gradient[i].numel(), "gradient and accumulator differ in size");
    targets.emplace_back(saliency[i]);
    sources.push_back(as_dense(gradient[i]));
    folds.push_back(choose_fold(mode, gradient[i].scalar_type()));
    ends.push_back(total += saliency[i].numel());
  }
  // One parallel loop over the elements of all tensors: small ones share a thread, a large one is split.
  torch::stable::parallel_for(0, total, kGrainSize, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t at = begin; at < end; ++i) {
      const int64_t first = i == 0 ? 0 : ends[i - 1];
      const int64_t stop = std::min(end, ends[i]);
      folds[i](write<float>(targets[i].dense()), sources[i].const_data_ptr(), at - first, stop - first);
      at = stop;
    }
  });
  for (InPlace& target : targets) target.store();
}

// [..., C] -> float32 [T, C]
Tensor as_float_rows(const Tensor& tensor) {
  const int64_t columns = tensor.size(tensor.dim() - 1);
  const int64_t rows = columns == 0 ? 0 : tensor.numel() / columns;
  const Tensor matrix = torch::stable::reshape(tensor, std::vector<int64_t>{rows, columns});
  return matrix.scalar_type() == ScalarType::Float ? matrix : torch::stable::to(matrix, ScalarType::Float);
}

void accumulate_linear_gradient_magnitude_(
    Tensor saliency, const Tensor& grad_output, const Tensor& input, std::string mode, bool per_sample) {
  check_accumulator(saliency);
  STD_TORCH_CHECK(saliency.dim() == 2, "the accumulator of a linear layer must be [N, K]");
  const int64_t rows = saliency.size(0), columns = saliency.size(1);
  STD_TORCH_CHECK(grad_output.dim() >= 1 && grad_output.dim() == input.dim() &&
                      grad_output.size(grad_output.dim() - 1) == rows && input.size(input.dim() - 1) == columns,
                  "grad_output must be [..., N] and input [..., K] for an accumulator [N, K]");
  for (int64_t d = 0; d + 1 < input.dim(); ++d) {
    STD_TORCH_CHECK(grad_output.size(d) == input.size(d), "grad_output and input differ in a leading dimension");
  }
  STD_TORCH_CHECK(!per_sample || input.dim() >= 2, "per_sample needs a leading sample dimension");
  if (saliency.numel() == 0 || input.numel() == 0) return;

  const Fold fold = choose_fold(mode, ScalarType::Float);
  const Tensor dy = as_float_rows(grad_output), x = as_float_rows(input);
  const int64_t samples = per_sample ? input.size(0) : 1;
  const int64_t tokens = x.size(0) / samples;
  const int64_t block_rows = std::min(rows, std::max(kMinBlockRows, kBlockElements / columns));
  const Tensor scratch = torch::stable::new_empty(saliency, {block_rows, columns});
  InPlace target(saliency);
  auto* accumulator = write<float>(target.dense());
  const auto* gradient = read<float>(scratch);

  for (int64_t row = 0; row < rows; row += block_rows) {
    const int64_t height = std::min(block_rows, rows - row);
    Tensor dy_columns = torch::stable::narrow(const_cast<Tensor&>(dy), 1, row, height);
    Tensor block = scratch;
    if (height < block_rows) block = torch::stable::narrow(block, 0, 0, height);
    for (int64_t sample = 0; sample < samples; ++sample) {
      Tensor dy_sample = dy_columns, x_sample = x;
      if (samples > 1) {
        dy_sample = torch::stable::narrow(dy_sample, 0, sample * tokens, tokens);
        x_sample = torch::stable::narrow(x_sample, 0, sample * tokens, tokens);
      }
      matmul_out(block, torch::stable::transpose(dy_sample, 0, 1), x_sample);
      torch::stable::parallel_for(0, height * columns, kGrainSize, [&](int64_t begin, int64_t end) {
        fold(accumulator + row * columns, gradient, begin, end);
      });
    }
  }
  target.store();
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m) {
  m.impl("accumulate_gradient_magnitude_", TORCH_BOX(&fade::accumulate_gradient_magnitude_));
  m.impl("accumulate_linear_gradient_magnitude_", TORCH_BOX(&fade::accumulate_linear_gradient_magnitude_));
}
