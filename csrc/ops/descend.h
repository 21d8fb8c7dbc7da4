#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/**
 * A rounding of w [..., in] (codes, scales and biases as mx.quantize gives them) improved by
 * coordinate descent on the layer's output error; `hessian` [in, in] is the second moment of the
 * layer's inputs, or with `samples` [n, in] what is added to the diagonal of samples' samples,
 * [in]. With `outputs` [out, out], the second moment of the gradients at its outputs, the errors of
 * rows add up; `samples` cannot be given as well. Always on the CPU: the steps of a row follow one
 * another.
 */
std::vector<mx::array> descend(const mx::array& w, const mx::array& codes, const mx::array& scales,
    const mx::array& biases, const mx::array& hessian, const std::optional<mx::array>& samples,
    const std::optional<mx::array>& outputs, int group_size, int bits, int sweeps);

class Descend : public mx::Primitive {
 public:
  Descend(mx::Stream stream, AffineFormat format, int sweeps, bool sampled)
      : Primitive(stream), format_(format), sweeps_(sweeps), sampled_(sampled) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqDescend)
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  AffineFormat format_;
  int sweeps_;
  bool sampled_; // the last input are samples, not outputs
};

} // namespace optiq
