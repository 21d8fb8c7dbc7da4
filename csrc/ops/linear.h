#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/** x @ w.T (or x @ w) in float32 accumulation, for float32, float16 or bfloat16 weights. */
mx::array linear(const mx::array& x, const mx::array& w, bool transpose,
    const std::optional<mx::array>& indices, mx::StreamOrDevice s = {});

class Linear : public mx::UnaryPrimitive {
 public:
  Linear(mx::Stream stream, bool transpose) : UnaryPrimitive(stream), transpose_(transpose) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;

  DEFINE_VMAP()
  DEFINE_GRADS()
  DEFINE_NAME(OptiqLinear)
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  bool transpose_;
};

} // namespace optiq
