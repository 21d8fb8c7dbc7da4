#include "ops/quantized_matmul.h"

#include <mlx/ops.h>

#include "launch/quantized_matmul.h"
#include "metal/encoder.h"
#include "ops/fail.h"
#include "ops/group_gradient.h"

namespace optiq {

using mx::array;

namespace {

constexpr const char* kName = "quantized_matmul";

} // namespace

array quantized_matmul(const array& x, const AffineWeight& w, bool transpose,
    const std::optional<array>& indices, bool sorted, bool exact, mx::StreamOrDevice s) {
  require_floating(kName, "x", x);
  auto shape = matmul_shape(kName, x, w.shape(kName), transpose, indices);
  std::vector<array> inputs = {x, w.codes, w.scales, w.biases};
  if (indices) {
    inputs.push_back(*indices);
  }
  return array(std::move(shape), mx::promote_types(x.dtype(), w.scales.dtype()),
      std::make_shared<QuantizedMatmul>(mx::to_stream(s), transpose, w.format, sorted, exact),
      std::move(inputs));
}

void QuantizedMatmul::eval_cpu(const std::vector<array>& inputs, array& out) {
  std::vector<array> in;
  for (const auto& a : inputs) {
    in.push_back(row_contiguous(a, stream()));
  }
  cpu::Weight weight = AffineWeight{in[1], in[2], in[3], format_}.view();
  weight.exact = exact_ && in[0].dtype() == mx::float32;
  std::optional<array> indices;
  if (in.size() == 5) {
    indices = in[4];
  }
  eval_matmul(in[0], weight, indices ? in[2].shape(0) : 1, transpose_, indices, out, stream());
}

void QuantizedMatmul::eval_gpu(const std::vector<array>& inputs, array& out) {
  const array& scales = inputs[2];
  launch::QuantizedMatmul op;
  int columns = out.shape(-1);
  op.rows = columns == 0 ? 0 : int(out.size() / columns);
  op.inner = inputs[0].shape(-1);
  op.x = float_type(inputs[0].dtype());
  op.weights = {{columns, format_, float_type(scales.dtype())}};
  op.transpose = transpose_;
  op.experts = inputs.size() == 5 ? scales.shape(0) : 0;
  op.sorted = sorted_;
  metal::run(launch::plan_quantized_matmul(op, metal::tuning(stream())), inputs, {out}, stream());
}

array QuantizedMatmul::apply(const std::vector<array>& inputs, const array& x, bool transpose) {
  std::optional<array> indices;
  if (inputs.size() == 5) {
    indices = inputs[4];
  }
  return quantized_matmul(
      x, {inputs[1], inputs[2], inputs[3], format_}, transpose, indices, sorted_, exact_, stream());
}

std::vector<array> QuantizedMatmul::jvp(const std::vector<array>& primals,
    const std::vector<array>& tangents, const std::vector<int>& argnums) {
  if (argnums.size() != 1 || argnums[0] != 0) {
    fail(kName, "forward-mode derivatives exist with respect to x only");
  }
  return {apply(primals, tangents[0], transpose_)};
}

std::vector<array> QuantizedMatmul::vjp(const std::vector<array>& primals,
    const std::vector<array>& cotangents, const std::vector<int>& argnums,
    const std::vector<array>&) {
  const array& x = primals[0];
  const array& dy = cotangents[0];
  std::optional<std::vector<array>> at_groups; // at scales and biases
  std::vector<array> grads;
  for (int arg : argnums) {
    if (arg == 0) {
      auto dx = apply(primals, dy, !transpose_);
      grads.push_back(mx::astype(dx, x.dtype(), stream()));
      continue;
    }
    if ((arg != 2 && arg != 3) || primals.size() == 5) {
      fail(kName, "gradients exist with respect to x, and to scales and biases of a single weight");
    }
    if (!at_groups) {
      at_groups = group_gradient(transpose_ ? dy : x, transpose_ ? x : dy, primals[1],
          primals[2].shape(-1), format_, stream());
    }
    grads.push_back(mx::astype((*at_groups)[arg - 2], primals[arg].dtype(), stream()));
  }
  return grads;
}

std::pair<std::vector<array>, std::vector<int>> QuantizedMatmul::vmap(
    const std::vector<array>& inputs, const std::vector<int>& axes) {
  for (size_t i = 1; i < inputs.size(); i++) {
    if (axes[i] != -1 || inputs.size() == 5) {
      fail(kName, "vmap runs over x only");
    }
  }
  auto x = mx::moveaxis(inputs[0], axes[0], 0, stream());
  return {{apply(inputs, x, transpose_)}, {0}};
}

bool QuantizedMatmul::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const QuantizedMatmul&>(other);
  return transpose_ == o.transpose_ && format_ == o.format_ && sorted_ == o.sorted_ &&
         exact_ == o.exact_;
}

std::vector<mx::Shape> QuantizedMatmul::output_shapes(const std::vector<array>& inputs) {
  auto shape = inputs[0].shape();
  const auto& scales = inputs[2];
  shape.back() = transpose_ ? scales.shape(-2) : scales.shape(-1) * format_.group_size;
  return {shape};
}

} // namespace optiq
