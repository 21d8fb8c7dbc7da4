#include "ops/linear.h"

#include <mlx/ops.h>

#include "ops/fail.h"

namespace optiq {

using mx::array;

array linear(const array& x, const array& w, bool transpose, const std::optional<array>& indices,
    mx::StreamOrDevice s) {
  require_floating("linear", "x", x);
  require_floating("linear", "w", w);
  auto shape = matmul_shape("linear", x, w.shape(), transpose, indices);
  std::vector<array> inputs = {x, w};
  if (indices) {
    inputs.push_back(*indices);
  }
  return array(std::move(shape), mx::promote_types(x.dtype(), w.dtype()),
      std::make_shared<Linear>(mx::to_stream(s), transpose), std::move(inputs));
}

void Linear::eval_cpu(const std::vector<array>& inputs, array& out) {
  array x = row_contiguous(inputs[0], stream());
  array w = row_contiguous(inputs[1], stream());
  std::optional<array> indices;
  if (inputs.size() == 3) {
    indices = row_contiguous(inputs[2], stream());
  }
  cpu::Weight weight{.data = w.data<char>(), .type = float_type(w.dtype())};
  weight.rows = w.shape(-2);
  weight.cols = w.shape(-1);
  eval_matmul(x, weight, indices ? w.shape(0) : 1, transpose_, indices, out, stream());
}

void Linear::eval_gpu(const std::vector<array>&, array&) {
  throw std::runtime_error("[linear] has no GPU kernel; use x @ w.T there");
}

std::vector<array> Linear::jvp(const std::vector<array>& primals,
    const std::vector<array>& tangents, const std::vector<int>& argnums) {
  std::optional<array> indices;
  if (primals.size() == 3) {
    indices = primals[2];
  }
  std::optional<array> out;
  for (size_t i = 0; i < argnums.size(); i++) {
    array part = argnums[i] == 0 ? linear(tangents[i], primals[1], transpose_, indices, stream())
                                 : linear(primals[0], tangents[i], transpose_, indices, stream());
    out = out ? mx::add(*out, part, stream()) : part;
  }
  return {*out};
}

std::vector<array> Linear::vjp(const std::vector<array>& primals,
    const std::vector<array>& cotangents, const std::vector<int>& argnums,
    const std::vector<array>&) {
  const array& x = primals[0];
  const array& w = primals[1];
  const array& dy = cotangents[0];
  std::optional<array> indices;
  if (primals.size() == 3) {
    indices = primals[2];
  }
  std::vector<array> grads;
  for (int arg : argnums) {
    if (arg == 0) {
      auto dx = linear(dy, w, !transpose_, indices, stream());
      grads.push_back(mx::astype(dx, x.dtype(), stream()));
    } else if (arg == 1 && !indices) {
      auto rows = [&](const array& a) {
        return mx::astype(mx::flatten(a, 0, -2, stream()), mx::float32, stream());
      };
      auto left = transpose_ ? rows(dy) : rows(x);
      auto right = transpose_ ? rows(x) : rows(dy);
      auto dw = mx::matmul(mx::transpose(left, stream()), right, stream());
      grads.push_back(mx::astype(dw, w.dtype(), stream()));
    } else {
      fail("linear",
          "no gradient with respect to stacked weights or indices; "
          "differentiate with respect to x, or use mx.gather_mm");
    }
  }
  return grads;
}

std::pair<std::vector<array>, std::vector<int>> Linear::vmap(
    const std::vector<array>& inputs, const std::vector<int>& axes) {
  if (inputs.size() != 2 || axes[1] != -1) {
    fail("linear", "vmap runs over x only; loop over the weights or use mx.matmul");
  }
  auto x = mx::moveaxis(inputs[0], axes[0], 0, stream());
  return {{linear(x, inputs[1], transpose_, std::nullopt, stream())}, {0}};
}

bool Linear::is_equivalent(const mx::Primitive& other) const {
  return transpose_ == static_cast<const Linear&>(other).transpose_;
}

std::vector<mx::Shape> Linear::output_shapes(const std::vector<array>& inputs) {
  auto shape = inputs[0].shape();
  shape.back() = inputs[1].shape(transpose_ ? -2 : -1);
  return {shape};
}

} // namespace optiq
