// Torch tensors as CPU and CUDA kernels see them through the stable ABI: typed pointers, and contiguous stand-ins for
// strided arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fade {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tensor itself where it is contiguous, without a trip through the dispatcher.
inline Tensor as_dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous stand-in for a tensor that is updated in place; store() writes it back where the tensor was strided.
class InPlace {
 public:
  explicit InPlace(const Tensor& target) : target_(target), dense_(as_dense(target)) {}
  const Tensor& dense() const { return dense_; }
  void store() {
    if (!target_.is_contiguous()) torch::stable::copy_(target_, dense_);
  }

 private:
  Tensor target_;
  Tensor dense_;
};

// Product of all sizes but the first: the columns of a weight [N, ...] seen as [N, K].
inline int64_t flat_columns(const Tensor& tensor) {
  int64_t columns = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) columns *= tensor.size(d);
  return columns;
}

}  // namespace fade
