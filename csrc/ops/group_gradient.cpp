#include "ops/group_gradient.h"

#include <stdexcept>

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

namespace optiq {

using mx::array;

std::vector<array> group_gradient(const array& out, const array& in, const array& codes, int groups,
    AffineFormat format, mx::Stream s) {
  auto rows = [&](const array& a) {
    return mx::astype(mx::reshape(a, {-1, a.shape(-1)}, s), mx::float32, s);
  };
  array left = rows(out), right = rows(in);
  mx::Shape shape = {left.shape(1), groups};
  if (s.device == mx::Device::cpu) {
    return array::make_arrays({shape, shape}, {mx::float32, mx::float32},
        std::make_shared<GroupGradient>(s, format), {left, right, codes});
  }
  auto split = [&](const array& a) { return mx::unflatten(a, -1, {groups, format.group_size}, s); };
  auto ones = mx::ones(shape, mx::float32, s), zeros = mx::zeros(shape, mx::float32, s);
  auto q = mx::dequantize(
      codes, ones, zeros, format.group_size, format.bits, "affine", std::nullopt, std::nullopt, s);
  auto dw = split(mx::matmul(mx::transpose(left, s), right, s));
  return {mx::sum(mx::multiply(dw, split(q), s), -1, false, s), mx::sum(dw, -1, false, s)};
}

void GroupGradient::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  std::vector<array> in = prepare(inputs, outs, stream());
  cpu::GroupGradient work{.out = in[0].data<float>(),
      .in = in[1].data<float>(),
      .codes = in[2].data<uint8_t>(),
      .scales = outs[0].data<float>(),
      .biases = outs[1].data<float>(),
      .m = in[0].shape(0),
      .rows = in[0].shape(1),
      .cols = in[1].shape(1),
      .format = format_};
  mx::cpu::get_command_encoder(stream()).dispatch(
      [work]() { cpu::kernels().group_gradient(work); });
}

void GroupGradient::eval_gpu(const std::vector<array>&, std::vector<array>&) {
  throw std::logic_error("[quantized_matmul] on a GPU the gradient at scales is made of MLX's ops");
}

bool GroupGradient::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const GroupGradient&>(other);
  return format_ == o.format_;
}

} // namespace optiq
