#pragma once

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

namespace mx = mlx::core;

/**
 * Over the last axis: KL(softmax(p) || softmax(q)), whether both have the same maximum, and the
 * log-sum-exps of p and of q.
 */
std::vector<mx::array> compare_logits(
    const mx::array& p, const mx::array& q, mx::StreamOrDevice s = {});

class KlDivergence : public mx::Primitive {
 public:
  explicit KlDivergence(mx::Stream stream) : Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqKlDivergence)
  DEFINE_DEFAULT_IS_EQUIVALENT()
};

} // namespace optiq
