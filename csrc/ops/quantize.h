#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/**
 * Codes, scales and biases of w: exactly mx.quantize, or by weighted search, in its layout.
 *
 * `importance` weighs the columns in the search: [in], or [experts, in] for w [experts, out, in].
 */
std::vector<mx::array> quantize(const mx::array& w, const std::optional<mx::array>& importance,
    int group_size, int bits, mx::StreamOrDevice s = {});

class Quantize : public mx::Primitive {
 public:
  Quantize(mx::Stream stream, AffineFormat format) : Primitive(stream), format_(format) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqQuantize)
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  AffineFormat format_;
};

} // namespace optiq
