#pragma once

#include "ops/key_values.h"

namespace optiq {

/** Softmax attention of q [B, heads, L, dim] over keys and values that may be records,
 * [B, heads, L, value_dim] in the dtype of q; see python/optiq/ops/attention.py. */
mx::array quantized_attention(const mx::array& q, const mx::array& k, const mx::array& v,
    AffineFormat k_format, AffineFormat v_format, float scale, const std::string& masking,
    const std::optional<mx::array>& mask, int window, const std::optional<mx::array>& sinks,
    float softcap, const std::optional<mx::array>& starts,
    const std::optional<KeyValues::Pair>& first, const std::optional<KeyValues::Pair>& recent,
    int value_dim, mx::StreamOrDevice s = {});

class QuantizedAttention : public mx::UnaryPrimitive {
 public:
  QuantizedAttention(mx::Stream stream, KeyValueLayout layout, float scale, float softcap,
      int value_dim, bool sinks)
      : UnaryPrimitive(stream),
        layout_(layout),
        scale_(scale),
        softcap_(softcap),
        value_dim_(value_dim),
        sinks_(sinks) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;

  DEFINE_GRADS()
  DEFINE_NAME(OptiqQuantizedAttention)
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  KeyValueLayout layout_;
  float scale_, softcap_;
  int value_dim_;
  bool sinks_;
};

} // namespace optiq
