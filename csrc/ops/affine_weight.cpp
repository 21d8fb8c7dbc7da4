#include "ops/affine_weight.h"

#include <mlx/dtype_utils.h>
#include <mlx/utils.h>

#include "cpu/affine_format.h"
#include "ops/fail.h"
#include "ops/matmul.h"

namespace optiq {

mx::Shape AffineWeight::shape(const char* op, const char* name) const {
  check_format(op, name, format);
  if (codes.dtype() != mx::uint32) {
    fail(op, name, "w is ", codes.dtype(), "; packed codes are uint32");
  }
  require_floating(op, (std::string(name) + "scales").c_str(), scales);
  if (biases.dtype() != scales.dtype() || biases.shape() != scales.shape()) {
    fail(op, name, "scales ", scales.shape(), " ", scales.dtype(), " and biases ", biases.shape(),
        " ", biases.dtype(), " must agree in shape and dtype");
  }
  if (codes.ndim() < 2 || scales.ndim() != codes.ndim()) {
    fail(op, name, "w ", codes.shape(), " and scales ", scales.shape(),
        " must have the same two or three axes");
  }
  int64_t cols = int64_t(scales.shape(-1)) * format.group_size;
  auto shape = scales.shape();
  shape.back() = int(cols);
  auto packed = shape;
  packed.back() = int(cols * format.bits / 32);
  if (codes.shape() != packed) {
    fail(op, name, "w is ", codes.shape(), " but scales ", scales.shape(), " at ", format.bits,
        " bits and group size ", format.group_size, " need codes of shape ", packed);
  }
  return shape;
}

cpu::Weight AffineWeight::view() const {
  cpu::Weight w{
      .data = codes.data<char>(), .scales = scales.data<char>(), .biases = biases.data<char>()};
  w.type = float_type(scales.dtype());
  w.format = format;
  w.rows = scales.shape(-2);
  w.cols = scales.shape(-1) * format.group_size;
  return w;
}

} // namespace optiq
