#include "ops/kl_divergence.h"

#include <sstream>
#include <stdexcept>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "ops/matmul.h"

namespace optiq {

using mx::array;

std::vector<array> compare_logits(const array& p, const array& q, mx::StreamOrDevice s) {
  require_floating("compare_logits", "p", p);
  require_floating("compare_logits", "q", q);
  if (p.shape() != q.shape() || p.ndim() == 0 || p.shape(-1) == 0) {
    std::ostringstream msg;
    msg << "[compare_logits] p " << p.shape() << " and q " << q.shape()
        << " must have the same shape, with at least one logit";
    throw std::invalid_argument(msg.str());
  }
  auto shape = p.shape();
  shape.pop_back();
  return array::make_arrays({shape, shape, shape, shape},
      {mx::float32, mx::bool_, mx::float32, mx::float32},
      std::make_shared<KlDivergence>(mx::to_stream(s)),
      {mx::astype(p, mx::float32, s), mx::astype(q, mx::float32, s)});
}

void KlDivergence::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  array p = row_contiguous(inputs[0], stream());
  array q = row_contiguous(inputs[1], stream());
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& out : outs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  encoder.set_input_array(p);
  encoder.set_input_array(q);
  cpu::KlDivergence work{p.data<float>(), q.data<float>(), outs[0].data<float>(),
      outs[1].data<bool>(), outs[2].data<float>(), outs[3].data<float>(), outs[0].size(),
      size_t(p.shape(-1))};
  encoder.dispatch([work]() { cpu::kernels().kl_divergence(work); });
}

void KlDivergence::eval_gpu(const std::vector<array>&, std::vector<array>&) {
  throw std::runtime_error("[compare_logits] has no GPU kernel; use the mx.* formula there");
}

} // namespace optiq
