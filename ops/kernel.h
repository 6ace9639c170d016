// What the CPU kernels share: LibTorch's stable ABI, vectors, and the choice of types by a tensor's dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace linzoo {

using torch::stable::Tensor;

// f(S{}, T{}) with the storage type S of `x` and the type T of its sums and states.
template <class F>
void dispatch(const Tensor& x, F f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{}, float{});
    case ScalarType::Half: return f(c10::Half{}, float{});
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

// f(T{}) where tensors come in the dtype of sums and states.
template <class F>
void dispatch_states(const Tensor& x, F f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, "expected float32 or float64");
  }
}

// The tokens of a scan order, or null for 0 .. L-1.
inline const int32_t* tokens_of(const std::optional<Tensor>& order, int64_t L) {
  if (!order) return nullptr;
  const auto* tokens = static_cast<const int32_t*>(order->data_ptr());
  for (int64_t i = 0; i < order->numel(); ++i)
    STD_TORCH_CHECK(tokens[i] >= 0 && tokens[i] < L, "order: every entry must lie in [0, ", L, "), got ", tokens[i],
                    " at flat index ", i);
  return tokens;
}

}  // namespace linzoo
