#include "ops/kl_divergence.h"

#include <algorithm>
#include <cmath>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "launch/kl_divergence.h"
#include "metal/encoder.h"
#include "ops/affine_weight.h"
#include "ops/fail.h"

namespace optiq {

using mx::array;

namespace {

constexpr const char* kName = "kl_divergence";

// Checks one side and returns the size of its vocabulary.
int check_side(char side, const array& h, const std::vector<array>& w, AffineFormat format) {
  std::string name = std::string("w_") + side;
  require_floating("kl_divergence", side == 'p' ? "h_p" : "h_q", h);
  if (h.ndim() == 0) {
    fail(kName, "h_", side, " has no axes; it must be [..., d]");
  }
  int cols = 0;
  if (format.dense()) {
    if (w.size() != 1) {
      fail(kName, name, " has ", w.size(), " arrays; a dense head is one");
    }
    require_floating("kl_divergence", name.c_str(), w[0]);
    if (w[0].ndim() != 2) {
      fail(kName, name, " is ", w[0].shape(), "; a head is [vocab, d]");
    }
    cols = w[0].shape(1);
  } else {
    if (w.size() != 3) {
      fail(kName, name, " has ", w.size(), " arrays; a quantized head is codes, scales and biases");
    }
    auto shape =
        AffineWeight{w[0], w[1], w[2], format}.shape("kl_divergence", (name + ".").c_str());
    if (shape.size() != 2) {
      fail(kName, name, " is ", shape, "; a head is [vocab, d]");
    }
    cols = shape[1];
  }
  if (h.shape(-1) != cols || cols == 0) {
    fail(kName, "the last axis of h_", side, " is ", h.shape(-1), " but ", name, " takes ", cols,
        cols == 0 ? "; it must be at least 1" : "");
  }
  return w[0].shape(0);
}

cpu::Weight weight(const array* w, AffineFormat format) {
  if (!format.dense()) {
    return AffineWeight{w[0], w[1], w[2], format}.view();
  }
  cpu::Weight out{.data = w[0].data<char>(), .type = float_type(w[0].dtype())};
  out.rows = w[0].shape(0);
  out.cols = w[0].shape(1);
  return out;
}

} // namespace

std::vector<array> compare_logits(const array& p, const array& q, mx::StreamOrDevice s) {
  require_floating("compare_logits", "p", p);
  require_floating("compare_logits", "q", q);
  if (p.shape() != q.shape() || p.ndim() == 0 || p.shape(-1) == 0) {
    fail("compare_logits", "p ", p.shape(), " and q ", q.shape(),
        " must have the same shape, with at least one logit");
  }
  auto shape = p.shape();
  shape.pop_back();
  return array::make_arrays({shape, shape, shape, shape},
      {mx::float32, mx::bool_, mx::float32, mx::float32},
      std::make_shared<CompareLogits>(mx::to_stream(s)),
      {mx::astype(p, mx::float32, s), mx::astype(q, mx::float32, s)});
}

void CompareLogits::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  auto in = prepare(inputs, outs, stream());
  cpu::KlDivergence work{in[0].data<float>(), in[1].data<float>(), outs[0].data<float>(),
      outs[1].data<bool>(), outs[2].data<float>(), outs[3].data<float>(), outs[0].size(),
      size_t(in[0].shape(-1))};
  mx::cpu::get_command_encoder(stream()).dispatch([work]() { cpu::kernels().kl_divergence(work); });
}

void CompareLogits::eval_gpu(const std::vector<array>&, std::vector<array>&) {
  throw std::runtime_error("[compare_logits] has no GPU kernel; use the mx.* formula there");
}

std::vector<array> kl_divergence(const array& h_p, const std::vector<array>& w_p, const array& h_q,
    const std::vector<array>& w_q, AffineFormat format_p, AffineFormat format_q, float soft_cap,
    mx::StreamOrDevice s) {
  int vocabulary = check_side('p', h_p, w_p, format_p);
  if (check_side('q', h_q, w_q, format_q) != vocabulary || vocabulary == 0) {
    fail(kName, "w_p has ", vocabulary, " rows and w_q ", w_q[0].shape(0),
        "; both must cover the same vocabulary of at least one token");
  }
  auto shape = h_p.shape();
  shape.pop_back();
  if (h_q.ndim() != h_p.ndim() || !std::equal(shape.begin(), shape.end(), h_q.shape().begin())) {
    fail(kName, "h_p is ", h_p.shape(), " and h_q ", h_q.shape(),
        "; all axes but the last must agree");
  }
  if (!(soft_cap >= 0) || std::isinf(soft_cap)) {
    fail(kName, "soft_cap is ", soft_cap, "; it must be positive and finite, or 0 for none");
  }
  std::vector<array> inputs = {mx::astype(h_p, mx::float32, s), mx::astype(h_q, mx::float32, s)};
  inputs.insert(inputs.end(), w_p.begin(), w_p.end());
  inputs.insert(inputs.end(), w_q.begin(), w_q.end());
  return array::make_arrays({shape, shape, shape, shape},
      {mx::float32, mx::bool_, mx::float32, mx::float32},
      std::make_shared<KlDivergence>(mx::to_stream(s), format_p, format_q, soft_cap), inputs);
}

bool HeadPrimitive::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const HeadPrimitive&>(other);
  return format_p_ == o.format_p_ && format_q_ == o.format_q_ && soft_cap_ == o.soft_cap_;
}

void KlDivergence::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  auto in = prepare(inputs, outs, stream());
  cpu::HeadKl work{.h_p = in[0].data<float>(),
      .h_q = in[1].data<float>(),
      .w_p = weight(&in[2], format_p_),
      .w_q = weight(&in[format_p_.dense() ? 3 : 5], format_q_),
      .cap = soft_cap_,
      .kl = outs[0].data<float>(),
      .agree = outs[1].data<bool>(),
      .lse_p = outs[2].data<float>(),
      .lse_q = outs[3].data<float>(),
      .rows = int(outs[0].size())};
  mx::cpu::get_command_encoder(stream()).dispatch([work]() { cpu::kernels().head_kl(work); });
}

void KlDivergence::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  const array& w_p = inputs[format_p_.dense() ? 2 : 3]; // a dense head, or the scales
  const array& w_q = inputs[(format_p_.dense() ? 3 : 5) + (format_q_.dense() ? 0 : 1)];
  launch::KlDivergenceOp op;
  op.tokens = int(outs[0].size());
  op.vocabulary = w_p.shape(0);
  op.p = {inputs[0].shape(-1), float_type(w_p.dtype()), format_p_};
  op.q = {inputs[1].shape(-1), float_type(w_q.dtype()), format_q_};
  op.soft_cap = soft_cap_;
  metal::run(launch::plan_kl_divergence(op), inputs, outs, stream());
}

std::vector<array> KlDivergence::vjp(const std::vector<array>& primals,
    const std::vector<array>& cotangents, const std::vector<int>& argnums,
    const std::vector<array>& outputs) {
  if (argnums.size() != 1 || argnums[0] != 1) {
    fail(kName, "gradients exist at h_q only; pass h_p and the heads through mx.stop_gradient");
  }
  std::vector<array> inputs = primals;
  for (const array& a : {outputs[2], outputs[3], cotangents[0], cotangents[3]}) {
    inputs.push_back(a);
  }
  return {array(primals[1].shape(), mx::float32,
      std::make_shared<KlDivergenceGradient>(stream(), format_p_, format_q_, soft_cap_),
      std::move(inputs))};
}

std::pair<std::vector<array>, std::vector<int>> KlDivergence::vmap(
    const std::vector<array>&, const std::vector<int>&) {
  fail(kName, "has no vmap; leading axes of h_p and h_q are batch axes already");
}

std::vector<mx::Shape> KlDivergence::output_shapes(const std::vector<array>& inputs) {
  auto shape = inputs[0].shape();
  shape.pop_back();
  return {shape, shape, shape, shape};
}

void KlDivergenceGradient::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outs) {
  auto in = prepare(inputs, outs, stream());
  const array* last = &in[in.size() - 4];
  cpu::HeadKlGradient work{.h_p = in[0].data<float>(),
      .h_q = in[1].data<float>(),
      .w_p = weight(&in[2], format_p_),
      .w_q = weight(&in[format_p_.dense() ? 3 : 5], format_q_),
      .cap = soft_cap_,
      .lse_p = last[0].data<float>(),
      .lse_q = last[1].data<float>(),
      .d_kl = last[2].data<float>(),
      .d_lse = last[3].data<float>(),
      .d_h = outs[0].data<float>(),
      .rows = int(last[0].size())};
  mx::cpu::get_command_encoder(stream()).dispatch(
      [work]() { cpu::kernels().head_kl_gradient(work); });
}

void KlDivergenceGradient::eval_gpu(const std::vector<array>&, std::vector<array>&) {
  throw std::runtime_error("[kl_divergence] has no GPU kernel; use the mx.* formula there");
}

std::vector<mx::Shape> KlDivergenceGradient::output_shapes(const std::vector<array>& inputs) {
  return {inputs[1].shape()};
}

} // namespace optiq
