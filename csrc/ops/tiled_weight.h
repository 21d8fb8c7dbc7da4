// An affine weight in the order in which the CPU reads it (cpu/tiled.h), in place of its arrays.
#pragma once

#include <memory>
#include <vector>

#include <mlx/utils.h>

#include "ops/affine_weight.h"
#include "ops/matmul.h"

namespace optiq {

class TiledWeight;
using TiledPtr = std::shared_ptr<const TiledWeight>;

class TiledWeight {
 public:
  /** Null where the kernels have no tiles for its shape. Throws std::invalid_argument where the
   * arrays do not belong together. */
  static TiledPtr make(const AffineWeight& w);

  /** Codes, scales and biases as they were. They are not computed unless they are read. */
  std::vector<array> arrays() const;

  /** For the kernels; valid as long as this is. */
  cpu::Weight view() const;

  /** x @ dequantize(w).T, as quantized_matmul() gives it. */
  static array product(const array& x, const TiledPtr& w, bool exact, mx::StreamOrDevice s = {});

 private:
  explicit TiledWeight(const AffineWeight& w);

  cpu::Weight weight_; // without data
  mx::Dtype dtype_;    // of scales and biases
  array data_;         // bytes, with room to begin at a cache line
};

/** What Python holds, with the arrays that it put in place of the weight's. */
struct TiledHandle {
  TiledPtr weight;
  std::vector<array> arrays = weight->arrays();
};

} // namespace optiq
