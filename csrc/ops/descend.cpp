#include "ops/descend.h"

#include <cstring>

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "cpu/affine_format.h"
#include "ops/fail.h"

namespace optiq {

std::vector<array> descend(const array& w, const array& codes, const array& scales,
    const array& biases, const array& hessian, const std::optional<array>& samples,
    const std::optional<array>& outputs, int group_size, int bits, int sweeps) {
  require_floating("descend", "w", w);
  AffineFormat format{.bits = bits, .group_size = group_size};
  check_format("descend", "", format);
  if (w.ndim() < 2 || w.shape(-1) % group_size != 0) {
    fail("descend", "w ", w.shape(), " must have two or more axes, the last a multiple of ",
        group_size);
  }
  auto packed = w.shape(), groups = w.shape();
  packed.back() = int(int64_t(w.shape(-1)) * bits / 32);
  groups.back() = w.shape(-1) / group_size;
  if (codes.dtype() != mx::uint32 || codes.shape() != packed) {
    fail("descend", "codes are ", codes.shape(), " ", codes.dtype(), "; they must be ", packed,
        " uint32");
  }
  for (auto* a : {&scales, &biases}) {
    if (a->dtype() != w.dtype() || a->shape() != groups) {
      fail("descend", a == &scales ? "scales" : "biases", " are ", a->shape(), " ", a->dtype(),
          "; they must be ", groups, " ", w.dtype());
    }
  }
  const auto cols = w.shape(-1);
  if (samples && outputs) {
    fail("descend", "samples and outputs are both given; leave one of them out");
  }
  if (samples && (samples->ndim() != 2 || samples->shape(1) != cols)) {
    fail("descend", "samples are ", samples->shape(), "; they must be [any, ", cols, "]");
  }
  const auto expected = samples ? mx::Shape{cols} : mx::Shape{cols, cols};
  if (hessian.shape() != expected) {
    fail("descend", "hessian is ", hessian.shape(), "; it must be ", expected);
  }
  if (outputs && (w.ndim() != 2 || outputs->shape() != mx::Shape{w.shape(0), w.shape(0)})) {
    fail("descend", "outputs are ", outputs->shape(), " and w is ", w.shape(),
        "; w must have two axes, and outputs be square with the first of them");
  }
  if (sweeps < 0) {
    fail("descend", "sweeps is ", sweeps, "; it must be 0 or more");
  }
  auto stream = mx::default_stream(mx::Device::cpu);
  std::vector<array> inputs = {w, codes, scales, biases, mx::astype(hessian, mx::float32, stream)};
  for (auto& more : {samples, outputs}) {
    if (more) {
      inputs.push_back(mx::astype(*more, mx::float32, stream));
    }
  }
  return array::make_arrays({packed, groups, groups}, {mx::uint32, w.dtype(), w.dtype()},
      std::make_shared<Descend>(stream, format, sweeps, samples.has_value()), inputs);
}

void Descend::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  std::vector<array> in = prepare(inputs, outs, stream());
  const array& w = in[0];
  if (w.size() == 0) {
    return;
  }
  const float* last = in.size() > 5 ? in[5].data<float>() : nullptr;
  cpu::Descent work{.w = w.data<char>(),
      .hessian = in[4].data<float>(),
      .samples = sampled_ ? last : nullptr,
      .outputs = sampled_ ? nullptr : last,
      .codes = outs[0].data<uint8_t>(),
      .scales = outs[1].data<char>(),
      .biases = outs[2].data<char>(),
      .rows = w.size() / w.shape(-1),
      .cols = size_t(w.shape(-1)),
      .sampled = sampled_ ? size_t(in[5].shape(0)) : 0,
      .format = format_,
      .sweeps = sweeps_,
      .type = float_type(w.dtype())};
  struct Copy {
    const char* from;
    char* to;
    size_t nbytes;
  };
  std::vector<Copy> start;
  for (int i = 0; i < 3; i++) {
    start.push_back({in[i + 1].data<char>(), outs[i].data<char>(), outs[i].nbytes()});
  }
  mx::cpu::get_command_encoder(stream()).dispatch([work, start]() {
    for (auto& copy : start) {
      std::memcpy(copy.to, copy.from, copy.nbytes);
    }
    cpu::kernels().descend(work);
  });
}

void Descend::eval_gpu(const std::vector<array>&, std::vector<array>&) {
  throw std::logic_error("[descend] it was put on the CPU");
}

bool Descend::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const Descend&>(other);
  return format_ == o.format_ && sweeps_ == o.sweeps_ && sampled_ == o.sampled_;
}

} // namespace optiq
