#pragma once

#include <vector>

#include <mlx/primitives.h>
#include <mlx/utils.h>

#include "ops/affine_weight.h"
#include "ops/matmul.h"

namespace optiq {

/** x @ dequantize(w).T for each of several weights, of any widths, in one launch; `exact` as in
 * quantized_matmul. */
std::vector<mx::array> mixed_quantized_matmul(const mx::array& x,
    const std::vector<AffineWeight>& parts, bool exact, mx::StreamOrDevice s = {});

class MixedQuantizedMatmul : public mx::Primitive {
 public:
  MixedQuantizedMatmul(mx::Stream stream, std::vector<AffineFormat> formats, bool exact)
      : Primitive(stream), formats_(std::move(formats)), exact_(exact) {}

  /** Inputs: x, then codes, scales and biases of each part. Outputs: one for each part. */
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_VMAP()
  DEFINE_GRADS()
  DEFINE_NAME(OptiqMixedQuantizedMatmul)
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  AffineWeight part(const std::vector<mx::array>& inputs, size_t i) const;
  std::vector<AffineWeight> parts(const std::vector<mx::array>& inputs) const;

  std::vector<AffineFormat> formats_;
  bool exact_;
};

} // namespace optiq
