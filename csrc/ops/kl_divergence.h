#pragma once

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

namespace mx = mlx::core;

/** KL(softmax(p) || softmax(q)) over the last axis, and whether both have the same maximum. */
std::pair<mx::array, mx::array> kl_from_logits(
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
