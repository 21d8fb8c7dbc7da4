#include "ops/model_ends.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "ops/embedding.h"
#include "ops/fail.h"

namespace optiq {

ModelEnds::ModelEnds(const AffineWeight& embedding, const array& norm, float eps)
    : embedding_{mx::contiguous(embedding.codes), mx::contiguous(embedding.scales),
          mx::contiguous(embedding.biases), embedding.format},
      norm_(mx::contiguous(mx::astype(norm, mx::float32))),
      eps_(eps) {
  mx::Shape shape = embedding.shape("model_ends", "embedding: ");
  if (shape.size() != 2 || norm_.shape() != mx::Shape{shape.back()}) {
    fail("model_ends", "the embedding is ", shape, " and the norm ", norm_.shape(),
        "; they must be [words, width] and [width]");
  }
  mx::eval(embedding_.codes, embedding_.scales, embedding_.biases, norm_);
}

void ModelEnds::embed(const int32_t* tokens, size_t n, float* h) const {
  embed_rows(embedding_.view(), tokens, n, h);
}

void ModelEnds::norm(float* h, size_t rows) const {
  cpu::kernels().rms_norm({h, nullptr, norm_.data<float>(), h, rows, width(), eps_, 1, true});
}

} // namespace optiq
