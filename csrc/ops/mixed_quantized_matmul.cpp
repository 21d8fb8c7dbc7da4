#include "ops/mixed_quantized_matmul.h"

#include <algorithm>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "launch/quantized_matmul.h"
#include "metal/encoder.h"
#include "ops/fail.h"
#include "ops/quantized_matmul.h"

namespace optiq {

using mx::array;

namespace {

constexpr const char* kName = "mixed_quantized_matmul";

} // namespace

std::vector<array> mixed_quantized_matmul(
    const array& x, const std::vector<AffineWeight>& parts, bool exact, mx::StreamOrDevice s) {
  require_floating(kName, "x", x);
  if (parts.empty()) {
    fail(kName, "parts is empty; it must hold at least one weight");
  }
  std::vector<array> inputs = {x};
  std::vector<AffineFormat> formats;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (size_t i = 0; i < parts.size(); i++) {
    const AffineWeight& w = parts[i];
    std::string name = "parts[" + std::to_string(i) + "].";
    shapes.push_back(matmul_shape(kName, x, w.shape(kName, name.c_str()), true, std::nullopt));
    dtypes.push_back(mx::promote_types(x.dtype(), w.scales.dtype()));
    formats.push_back(w.format);
    inputs.insert(inputs.end(), {w.codes, w.scales, w.biases});
  }
  return array::make_arrays(std::move(shapes), dtypes,
      std::make_shared<MixedQuantizedMatmul>(mx::to_stream(s), std::move(formats), exact), inputs);
}

AffineWeight MixedQuantizedMatmul::part(const std::vector<array>& inputs, size_t i) const {
  return {inputs[3 * i + 1], inputs[3 * i + 2], inputs[3 * i + 3], formats_[i]};
}

std::vector<AffineWeight> MixedQuantizedMatmul::parts(const std::vector<array>& inputs) const {
  std::vector<AffineWeight> all;
  for (size_t i = 0; i < formats_.size(); i++) {
    all.push_back(part(inputs, i));
  }
  return all;
}

void MixedQuantizedMatmul::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  std::vector<array> in;
  for (const auto& a : inputs) {
    in.push_back(row_contiguous(a, stream()));
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(in[0]);
  std::vector<Projection> projections;
  for (size_t i = 0; i < outs.size(); i++) {
    outs[i].set_data(mx::allocator::malloc(outs[i].nbytes()));
    encoder.set_output_array(outs[i]);
    cpu::Weight w = part(in, i).view();
    w.exact = exact_ && in[0].dtype() == mx::float32;
    projections.push_back({w, outs[i].data<char>(), float_type(outs[i].dtype())});
  }
  const array& x = in[0];
  int cols = projections[0].w.cols;
  int rows = cols == 0 ? 0 : int(x.size() / cols);
  encoder.dispatch(
      [x = x.data<char>(), type = float_type(x.dtype()), rows, cols,
          projections = std::move(projections)]() { multiply(x, type, rows, cols, projections); });
}

void MixedQuantizedMatmul::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  launch::QuantizedMatmul op;
  op.inner = inputs[0].shape(-1);
  op.x = float_type(inputs[0].dtype());
  for (size_t i = 0; i < outs.size(); i++) {
    const array& out = outs[i];
    int columns = out.shape(-1);
    op.rows = std::max(op.rows, columns == 0 ? 0 : int(out.size() / columns));
    op.weights.push_back({columns, formats_[i], float_type(inputs[3 * i + 2].dtype())});
  }
  metal::run(launch::plan_quantized_matmul(op, metal::tuning(stream())), inputs, outs, stream());
}

std::vector<array> MixedQuantizedMatmul::jvp(const std::vector<array>& primals,
    const std::vector<array>& tangents, const std::vector<int>& argnums) {
  if (argnums.size() != 1 || argnums[0] != 0) {
    fail(kName, "forward-mode derivatives exist with respect to x only");
  }
  return mixed_quantized_matmul(tangents[0], parts(primals), exact_, stream());
}

std::vector<array> MixedQuantizedMatmul::vjp(const std::vector<array>& primals,
    const std::vector<array>& cotangents, const std::vector<int>& argnums,
    const std::vector<array>&) {
  if (argnums.size() != 1 || argnums[0] != 0) {
    fail(kName,
        "gradients exist with respect to x only; use quantized_matmul for those of scales and "
        "biases");
  }
  std::optional<array> dx;
  for (size_t i = 0; i < formats_.size(); i++) {
    auto term = quantized_matmul(
        cotangents[i], part(primals, i), false, std::nullopt, false, exact_, stream());
    dx = dx ? mx::add(*dx, term, stream()) : term;
  }
  return {mx::astype(*dx, primals[0].dtype(), stream())};
}

std::pair<std::vector<array>, std::vector<int>> MixedQuantizedMatmul::vmap(
    const std::vector<array>& inputs, const std::vector<int>& axes) {
  for (size_t i = 1; i < inputs.size(); i++) {
    if (axes[i] != -1) {
      fail(kName, "vmap runs over x only");
    }
  }
  auto x = mx::moveaxis(inputs[0], axes[0], 0, stream());
  return {mixed_quantized_matmul(x, parts(inputs), exact_, stream()),
      std::vector<int>(formats_.size(), 0)};
}

bool MixedQuantizedMatmul::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const MixedQuantizedMatmul&>(other);
  return formats_ == o.formats_ && exact_ == o.exact_;
}

std::vector<mx::Shape> MixedQuantizedMatmul::output_shapes(const std::vector<array>& inputs) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i < formats_.size(); i++) {
    auto shape = inputs[0].shape();
    shape.back() = inputs[3 * i + 2].shape(-2);
    shapes.push_back(std::move(shape));
  }
  return shapes;
}

} // namespace optiq
