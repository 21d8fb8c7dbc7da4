#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/** x @ dequantize(w).T (or x @ dequantize(w)) for affine codes, accumulated in float32. */
mx::array quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales,
    const mx::array& biases, bool transpose, int group_size, int bits,
    const std::optional<mx::array>& indices, mx::StreamOrDevice s = {});

class QuantizedMatmul : public mx::UnaryPrimitive {
 public:
  QuantizedMatmul(mx::Stream stream, bool transpose, int group_size, int bits)
      : UnaryPrimitive(stream), transpose_(transpose), group_size_(group_size), bits_(bits) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;

  DEFINE_VMAP()
  DEFINE_GRADS()
  DEFINE_NAME(OptiqQuantizedMatmul)
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  mx::array apply(const std::vector<mx::array>& inputs, const mx::array& x, bool transpose);

  bool transpose_;
  int group_size_;
  int bits_;
};

} // namespace optiq
