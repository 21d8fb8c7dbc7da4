#pragma once

#include "ops/affine_weight.h"
#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/** x @ dequantize(w).T (or x @ dequantize(w)) for affine codes, accumulated in float32. `sorted`:
 * the indices ascend, which a GPU makes use of. Unless `exact`, the CPU reads x of float32 as
 * 16-bit fixed point (cpu/fixed.h). */
mx::array quantized_matmul(const mx::array& x, const AffineWeight& w, bool transpose,
    const std::optional<mx::array>& indices, bool sorted, bool exact, mx::StreamOrDevice s = {});

class QuantizedMatmul : public mx::UnaryPrimitive {
 public:
  QuantizedMatmul(mx::Stream stream, bool transpose, AffineFormat format, bool sorted, bool exact)
      : UnaryPrimitive(stream),
        transpose_(transpose),
        format_(format),
        sorted_(sorted),
        exact_(exact) {}

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
  AffineFormat format_;
  bool sorted_;
  bool exact_;
};

} // namespace optiq
