#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/**
 * Over the last axis: KL(softmax(p) || softmax(q)), whether both have the same maximum, and the
 * log-sum-exps of p and of q.
 */
std::vector<mx::array> compare_logits(
    const mx::array& p, const mx::array& q, mx::StreamOrDevice s = {});

/**
 * The same four of the logits cap * tanh(h @ w.T / cap), without storing them.
 *
 * h is [..., d], a head w is one dense array [vocab, d] with a dense format, or codes, scales and
 * biases. A soft cap of 0 means none. Gradients exist at h_q.
 */
std::vector<mx::array> kl_divergence(const mx::array& h_p, const std::vector<mx::array>& w_p,
    const mx::array& h_q, const std::vector<mx::array>& w_q, AffineFormat format_p,
    AffineFormat format_q, float soft_cap, mx::StreamOrDevice s = {});

class CompareLogits : public mx::Primitive {
 public:
  explicit CompareLogits(mx::Stream stream) : Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqCompareLogits)
  DEFINE_DEFAULT_IS_EQUIVALENT()
};

/** What both directions of the streamed KL share: inputs h_p, h_q, w_p..., w_q... */
class HeadPrimitive : public mx::Primitive {
 public:
  HeadPrimitive(mx::Stream stream, AffineFormat format_p, AffineFormat format_q, float soft_cap)
      : Primitive(stream), format_p_(format_p), format_q_(format_q), soft_cap_(soft_cap) {}

  bool is_equivalent(const mx::Primitive& other) const override;

 protected:
  AffineFormat format_p_, format_q_;
  float soft_cap_;
};

class KlDivergence : public HeadPrimitive {
 public:
  using HeadPrimitive::HeadPrimitive;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;

  DEFINE_VMAP()
  DEFINE_NAME(OptiqKlDivergence)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
};

/** Further inputs lse_p, lse_q, and the cotangents of the KL and of lse_q. */
class KlDivergenceGradient : public HeadPrimitive {
 public:
  using HeadPrimitive::HeadPrimitive;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqKlDivergenceGradient)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
};

} // namespace optiq
