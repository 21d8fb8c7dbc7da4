#include "ops/quantized_attention.h"

#include <algorithm>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "launch/attention.h"
#include "metal/encoder.h"
#include "ops/fail.h"

namespace optiq {
namespace {

constexpr const char* kName = "quantized_attention";

// The kernels on a GPU read plain vectors in the type of the queries, and a mask to add in float32.
void cast_for_gpu(array& k, array& v, KeyValues& kv, mx::Dtype type, mx::StreamOrDevice s) {
  auto cast = [&](array& x, AffineFormat format = {}) {
    if (format.dense()) {
      x = mx::astype(x, type, s);
    }
  };
  cast(k, kv.k_format);
  cast(v, kv.v_format);
  for (auto* exact : {&kv.first, &kv.recent}) {
    if (*exact) {
      cast((*exact)->first);
      cast((*exact)->second);
    }
  }
  if (kv.mask && kv.mask->dtype() != mx::bool_) {
    kv.mask = mx::astype(*kv.mask, mx::float32, s);
  }
}

launch::KvTensor kv_tensor(const array& x, int dim, AffineFormat format) {
  auto strides = metal::strides_handed_on(x);
  return {dim, format, {strides[0], strides[1], strides[2]}};
}

} // namespace

array quantized_attention(const array& q, const array& k, const array& v, AffineFormat k_format,
    AffineFormat v_format, float scale, const std::string& masking,
    const std::optional<array>& mask, int window, const std::optional<array>& sinks, float softcap,
    const std::optional<array>& starts, const std::optional<KeyValues::Pair>& first,
    const std::optional<KeyValues::Pair>& recent, int value_dim, mx::StreamOrDevice s) {
  require_floating(kName, "q", q);
  if (q.ndim() != 4 || k.ndim() != 4 || k.shape(1) == 0 || q.shape(1) % k.shape(1) != 0) {
    fail(kName, "q ", q.shape(), " and keys ", k.shape(),
        " must be [B, heads, L, dim] and [B, kv_heads, S, ...], heads a multiple of kv_heads");
  }
  AttentionShape shape{q.shape(0), q.shape(1), k.shape(1), q.shape(2), q.shape(3),
      value_dim ? value_dim : q.shape(3)};
  for (int dim : {shape.dim, shape.value_dim}) {
    if (dim < 8 || dim % 8 != 0) {
      fail(kName, "vectors have ", dim, " elements; it must be a multiple of 8");
    }
  }
  KeyValues kv{k_format, v_format, masking, mask, window, starts, first, recent};
  auto layout = kv.check(kName, shape, k, v);
  std::vector<array> inputs = {q, k, v};
  if (mx::to_stream(s).device == mx::Device::gpu) {
    cast_for_gpu(inputs[1], inputs[2], kv, q.dtype(), s);
  }
  kv.append(inputs, s);
  if (sinks) {
    if (sinks->ndim() != 1 || sinks->shape(0) != shape.heads) {
      fail(kName, "sinks are ", sinks->shape(), "; there must be one for each of ", shape.heads,
          " heads");
    }
    inputs.push_back(mx::astype(*sinks, mx::float32, s));
  }
  return array({shape.batch, shape.heads, shape.rows, shape.value_dim}, q.dtype(),
      std::make_shared<QuantizedAttention>(
          mx::to_stream(s), layout, scale, softcap, shape.value_dim, sinks.has_value()),
      std::move(inputs));
}

void QuantizedAttention::eval_cpu(const std::vector<array>& inputs, array& out) {
  // In memory [batch, rows, heads, value_dim], as the projection that follows reads it.
  int heads = out.shape(1), rows = out.shape(2), dim = out.shape(3);
  bool plain = heads == 1 || rows == 1;
  out.set_data(mx::allocator::malloc(out.nbytes()), out.size(),
      {int64_t(rows) * heads * dim, dim, int64_t(heads) * dim, 1}, {true, plain, out.size() <= 1});
  if (out.size() == 0) {
    return;
  }
  array q = inputs[0].strides().back() == 1 ? inputs[0] : row_contiguous(inputs[0], stream());
  cpu::Attention a{};
  a.q = q.data<char>();
  a.type = float_type(q.dtype());
  a.q_batch = q.strides()[0], a.q_head = q.strides()[1], a.q_row = q.strides()[2];
  layout_.set(a, &inputs[1], &inputs[2], inputs.data() + 3, stream());
  if (sinks_) {
    a.sinks = row_contiguous(inputs.back(), stream()).data<float>();
  }
  a.y = out.data<char>();
  a.batch = out.shape(0);
  a.heads = heads;
  a.kv_heads = inputs[1].shape(1);
  a.rows = rows;
  a.keys = inputs[1].shape(2);
  a.dim = q.shape(3);
  a.value_dim = dim;
  a.scale = scale_;
  a.softcap = softcap_;
  mx::cpu::get_command_encoder(stream()).dispatch([a]() { cpu::kernels().attention(&a, 1); });
}

void QuantizedAttention::eval_gpu(const std::vector<array>& inputs, array& out) {
  using Mask = launch::QuantizedAttention::Mask;
  const array &q = inputs[0], &k = inputs[1], &v = inputs[2];
  launch::QuantizedAttention op;
  op.batch = q.shape(0);
  op.heads = q.shape(1);
  op.kv_heads = k.shape(1);
  op.rows = q.shape(2);
  op.keys = k.shape(2);
  op.type = float_type(q.dtype());
  op.k = kv_tensor(k, q.shape(3), layout_.k_format);
  op.v = kv_tensor(v, out.shape(3), layout_.v_format);
  op.scale = scale_;
  op.softcap = softcap_;
  op.causal = layout_.masking == cpu::Masking::causal;
  op.window = layout_.window;
  size_t next = 3;
  if (layout_.mask) {
    const array& mask = inputs[next++];
    op.mask = mask.dtype() == mx::bool_ ? Mask::seen : Mask::added;
    op.mask_shape = {1, 1, 1, 1};
    std::copy(mask.shape().begin(), mask.shape().end(), op.mask_shape.end() - mask.ndim());
  }
  op.starts = layout_.starts;
  next += op.starts;
  op.first = layout_.first ? inputs[next].shape(2) : 0;
  next += layout_.first ? 2 : 0;
  op.recent = layout_.recent ? inputs[next].shape(2) : 0;
  op.sinks = sinks_;
  metal::run(
      launch::plan_quantized_attention(op, metal::tuning(stream())), inputs, {out}, stream());
}

std::vector<array> QuantizedAttention::jvp(
    const std::vector<array>&, const std::vector<array>&, const std::vector<int>&) {
  fail(kName, "there are no gradients; train with plain keys and values");
}

std::vector<array> QuantizedAttention::vjp(const std::vector<array>&, const std::vector<array>&,
    const std::vector<int>&, const std::vector<array>&) {
  fail(kName, "there are no gradients; train with plain keys and values");
}

bool QuantizedAttention::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const QuantizedAttention&>(other);
  return layout_ == o.layout_ && scale_ == o.scale_ && softcap_ == o.softcap_ &&
         value_dim_ == o.value_dim_ && sinks_ == o.sinks_;
}

} // namespace optiq
