#include "ops/quantize.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "cpu/affine_format.h"
#include "launch/quantize.h"
#include "metal/encoder.h"
#include "ops/fail.h"

namespace optiq {

std::vector<array> quantize(const array& w, const std::optional<array>& importance, int group_size,
    int bits, mx::StreamOrDevice s) {
  require_floating("quantize", "w", w);
  AffineFormat format{.bits = bits, .group_size = group_size};
  check_format("quantize", "", format);
  if (w.ndim() < 2 || w.shape(-1) % group_size != 0) {
    fail("quantize", "w ", w.shape(), " must have two or more axes, the last a multiple of ",
        group_size);
  }
  std::vector<array> inputs = {w};
  if (importance) {
    mx::Shape shared = {w.shape(-1)}, each = {w.shape(0), w.shape(-1)};
    if (importance->shape() != shared && (w.ndim() != 3 || importance->shape() != each)) {
      fail("quantize", "importance is ", importance->shape(), "; it must be ", shared,
          w.ndim() == 3 ? " or one row per expert" : "");
    }
    inputs.push_back(mx::astype(*importance, mx::float32, s));
  }
  auto packed = w.shape(), groups = w.shape();
  packed.back() = int(int64_t(w.shape(-1)) * bits / 32);
  groups.back() = w.shape(-1) / group_size;
  return array::make_arrays({packed, groups, groups}, {mx::uint32, w.dtype(), w.dtype()},
      std::make_shared<Quantize>(mx::to_stream(s), format), inputs);
}

void Quantize::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  array w = row_contiguous(inputs[0], stream());
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(w);
  for (auto& out : outs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  if (w.size() == 0) {
    return;
  }
  cpu::Quantize work{.w = w.data<char>(),
      .importance = nullptr,
      .codes = outs[0].data<uint8_t>(),
      .scales = outs[1].data<char>(),
      .biases = outs[2].data<char>(),
      .rows = w.size() / w.shape(-1),
      .cols = size_t(w.shape(-1)),
      .rows_per_importance = 1,
      .format = format_,
      .type = float_type(w.dtype())};
  if (inputs.size() == 2) {
    array importance = row_contiguous(inputs[1], stream());
    encoder.set_input_array(importance);
    work.importance = importance.data<float>();
    size_t count = importance.size() / work.cols;
    work.rows_per_importance = work.rows / count;
  }
  encoder.dispatch([work]() { cpu::kernels().quantize(work); });
}

void Quantize::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  const array& w = inputs[0];
  launch::QuantizeOp op;
  op.cols = w.shape(-1);
  op.rows = op.cols == 0 ? 0 : w.size() / op.cols;
  op.format = format_;
  op.type = float_type(w.dtype());
  if (inputs.size() == 2 && w.size() > 0) {
    op.rows_per_importance = op.rows / (inputs[1].size() / op.cols);
  }
  metal::run(launch::plan_quantize(op), inputs, outs, stream());
}

bool Quantize::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const Quantize&>(other);
  return format_ == o.format_;
}

} // namespace optiq
