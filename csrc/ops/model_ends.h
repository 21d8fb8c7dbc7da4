// What a model has around its blocks: an embedding before them and a norm after.
#pragma once

#include <memory>

#include "ops/affine_weight.h"
#include "ops/matmul.h"

namespace optiq {

class ModelEnds {
 public:
  /** An embedding [words, width] and the weight [width] of an RMSNorm; they are evaluated. Throws
   * std::invalid_argument where they do not belong together. */
  ModelEnds(const AffineWeight& embedding, const array& norm, float eps);

  int width() const {
    return norm_.shape(0);
  }
  /** Rows h [n, width] of tokens, as embedding() gives them. */
  void embed(const int32_t* tokens, size_t n, float* h) const;
  /** The norm of h [rows, width] in place, as rms_norm() gives it. */
  void norm(float* h, size_t rows) const;

 private:
  AffineWeight embedding_;
  array norm_;
  float eps_;
};

using EndsPtr = std::shared_ptr<const ModelEnds>;

} // namespace optiq
