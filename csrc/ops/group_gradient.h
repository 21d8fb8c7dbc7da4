#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/**
 * The gradients at scales and biases, float32 [out, groups], of a weight with these codes that
 * takes `in` [..., in] to results whose gradient is `out` [..., out].
 */
std::vector<mx::array> group_gradient(const mx::array& out, const mx::array& in,
    const mx::array& codes, int groups, AffineFormat format, mx::Stream s);

/** The same on a CPU, where the gradient at the dequantized weight is never held. */
class GroupGradient : public mx::Primitive {
 public:
  GroupGradient(mx::Stream stream, AffineFormat format) : Primitive(stream), format_(format) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqGroupGradient)
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  AffineFormat format_;
};

} // namespace optiq
