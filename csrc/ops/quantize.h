#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/**
 * Codes, scales and biases of w, in the layout of mx.quantize, by weighted search.
 *
 * `importance` weighs the columns: [in], or [experts, in] for w [experts, out, in].
 */
std::vector<mx::array> quantize(const mx::array& w, const std::optional<mx::array>& importance,
    int group_size, int bits, mx::StreamOrDevice s = {});

class Quantize : public mx::Primitive {
 public:
  Quantize(mx::Stream stream, int group_size, int bits, mx::Dtype dtype)
      : Primitive(stream), group_size_(group_size), bits_(bits), dtype_(dtype) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outs) override;

  DEFINE_NAME(OptiqQuantize)
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  int group_size_;
  int bits_;
  mx::Dtype dtype_; // that scales and biases are stored in
};

} // namespace optiq
