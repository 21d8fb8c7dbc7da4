#include "ops/decoder_block.h"

#include <mlx/ops.h>

#include "ops/affine_weight.h"
#include "ops/training.h"

namespace optiq {

const void* DecoderBlock::keep(const array& a) {
  if (a.is_tracer()) {
    fail_block("a weight is being traced");
  }
  array kept = mx::contiguous(a);
  kept.eval();
  kept_.push_back(kept);
  return kept.data<char>();
}

const float* DecoderBlock::vector(const char* name, const array& a, int size) {
  if (a.ndim() != 1 || a.shape(0) != size) {
    fail_block(name, " is ", a.shape(), "; it must be [", size, "]");
  }
  require_floating("decoder_block", name, a);
  return static_cast<const float*>(keep(mx::astype(a, mx::float32)));
}

cpu::Projection DecoderBlock::projection(const char* name, const Matrix& m) {
  const auto& [w, scales, biases, group_size, bits, bias, tiles] = m;
  cpu::Projection p;
  if (w.ndim() != 2) {
    fail_block(name, " is ", w.shape(), "; it must have two axes");
  }
  p.w.rows = w.shape(0);
  if (tiles) {
    tiled_.push_back(tiles->weight);
    p.w = tiles->weight->view();
    p.w.exact = exact_;
  } else if (scales) {
    if (!biases) {
      fail_block(name, " has scales but no biases; it needs both");
    }
    AffineWeight weight{w, *scales, *biases, {.bits = bits, .group_size = group_size}};
    p.w.cols = weight.shape("decoder_block", (std::string(name) + ": ").c_str())[1];
    p.w.type = float_type(scales->dtype());
    p.w.format = weight.format;
    p.w.exact = exact_;
    p.w.scales = keep(*scales);
    p.w.biases = keep(*biases);
    p.w.data = keep(w);
  } else {
    require_floating("decoder_block", name, w);
    p.w.type = float_type(w.dtype());
    p.w.cols = w.shape(1);
    p.w.data = keep(w);
  }
  if (bias) {
    p.bias = vector(name, *bias, p.w.rows);
  }
  return p;
}

std::optional<cpu::Norm> DecoderBlock::norm(const char* name, const Norm& n, int size) {
  if (!n) {
    return std::nullopt;
  }
  const auto& [weight, eps] = *n;
  return cpu::Norm{weight ? vector(name, *weight, size) : nullptr, eps};
}

void DecoderBlock::set_attention(const std::vector<Matrix>& qkv, const Matrix& out, int heads,
    int kv_heads, float scale, const Norm& in, const Norm& q, const Norm& k, const Norm& v,
    const Norm& post, bool whole_norm, const std::optional<Rope>& rope,
    const std::optional<array>& sinks, float softcap, float gain) {
  cpu::AttentionLayer layer;
  layer.out = projection("the output projection", out);
  layer.heads = heads;
  layer.kv_heads = kv_heads;
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || layer.out.w.cols % heads != 0) {
    fail_block(heads, " heads and ", kv_heads, " key heads do not divide ", layer.out.w.cols);
  }
  int dim = layer.head_dim = layer.out.w.cols / heads;
  if (dim % 8 != 0) {
    fail_block("heads of ", dim, " are no multiple of 8");
  }
  int rows = 0;
  for (const auto& m : qkv) {
    layer.qkv.push_back(projection("a projection", m));
    rows += layer.qkv.back().w.rows;
    if (layer.qkv.back().w.cols != layer.width()) {
      fail_block("a projection takes ", layer.qkv.back().w.cols, " values, not ", layer.width());
    }
  }
  int values = qkv.size() == 2 ? 1 : 2;
  if (qkv.empty() || qkv.size() > 3 || rows != (heads + values * kv_heads) * dim ||
      (qkv.size() > 1 && layer.qkv[0].w.rows != heads * dim) ||
      (qkv.size() > 1 && layer.qkv[1].w.rows != kv_heads * dim)) {
    fail_block("the projections have ", rows, " rows for ", heads, " + ", values, " x ", kv_heads,
        " heads of ", dim);
  }
  layer.scale = scale;
  layer.softcap = softcap;
  layer.gain = gain;
  layer.ranks = ranks_.get();
  layer.in = norm("the input norm", in, layer.width());
  layer.post = norm("the output norm", post, layer.width());
  layer.q = norm("the query norm", q, whole_norm ? heads * dim : dim);
  layer.k = norm("the key norm", k, whole_norm ? kv_heads * dim : dim);
  layer.v = norm("the value norm", v, dim);
  layer.whole_norm = whole_norm;
  if (rope) {
    auto& r = layer.rope;
    std::tie(r.dims, r.traditional, r.frequencies, r.magnitude) = *rope;
    if (r.dims < 2 || r.dims > dim || r.dims % 2 != 0 || int(r.frequencies.size()) != r.dims / 2) {
      fail_block("a rotation of ", r.dims, " values with ", r.frequencies.size(),
          " frequencies does not fit heads of ", dim);
    }
  }
  if (sinks) {
    layer.sinks = vector("sinks", *sinks, heads);
  }
  attention = std::move(layer);
}

void DecoderBlock::set_mlp(const std::vector<Matrix>& gate_up, const Matrix& down,
    const std::string& activation, const Norm& in, const Norm& post, float gain) {
  cpu::MlpLayer layer;
  layer.down = projection("the down projection", down);
  int inner = layer.down.w.cols, width = layer.down.w.rows;
  int rows = 0;
  for (const auto& m : gate_up) {
    layer.gate_up.push_back(projection("a gate or up projection", m));
    const auto& p = layer.gate_up.back();
    rows += p.w.rows;
    if (p.w.cols != width || (p.bias == nullptr) != (layer.gate_up[0].bias == nullptr)) {
      fail_block("gate and up projections do not belong together");
    }
  }
  if (gate_up.empty() || gate_up.size() > 2 || rows != 2 * inner ||
      (gate_up.size() == 2 && layer.gate_up[0].w.rows != inner)) {
    fail_block("gate and up projections have ", rows, " rows for a down projection of ", inner);
  }
  layer.activation = activation_of("decoder_block", activation);
  layer.in = norm("the input norm", in, width);
  layer.post = norm("the output norm", post, width);
  layer.gain = gain;
  layer.ranks = ranks_.get();
  if (attention && attention->width() != width) {
    fail_block("attention has ", attention->width(), " values, the MLP ", width);
  }
  mlp = std::move(layer);
}

void DecoderBlock::set_terms(const std::vector<TermsPtr>& terms) {
  std::vector<const cpu::Projection*> projections;
  if (attention) {
    for (const auto& p : attention->qkv) {
      projections.push_back(&p);
    }
    projections.push_back(&attention->out);
  }
  if (mlp) {
    for (const auto& p : mlp->gate_up) {
      projections.push_back(&p);
    }
    projections.push_back(&mlp->down);
  }
  if (terms.size() != projections.size()) {
    fail_block("terms of ", terms.size(), " projections; the block has ", projections.size());
  }
  for (size_t i = 0; i < terms.size(); i++) {
    const auto& w = projections[i]->w;
    if (terms[i] && (terms[i]->in != w.cols || terms[i]->out != w.rows)) {
      fail_block("a term takes ", terms[i]->in, " to ", terms[i]->out, ", its projection ", w.cols,
          " to ", w.rows);
    }
  }
  terms_ = terms;
}

TermsOfRows DecoderBlock::terms(const std::vector<int>& slots, int batch, int rows) const {
  if (slots.empty() || terms_.empty()) {
    return {};
  }
  if (int(slots.size()) != batch) {
    fail_block(slots.size(), " slots for a batch of ", batch);
  }
  return {terms_, slots, rows};
}

const cpu::AttentionLayer& DecoderBlock::attention_over(const array& h, bool with_mlp) const {
  if (h.dtype() != mx::float32) {
    fail_block("h is ", h.dtype(), "; it must be float32");
  }
  return attention_over(h.shape(), with_mlp);
}

const cpu::AttentionLayer& DecoderBlock::attention_over(const mx::Shape& h, bool with_mlp) const {
  if (!attention || (with_mlp && !mlp)) {
    fail_block("the block has no ", attention ? "MLP" : "attention");
  }
  if (h.size() != 3 || h[2] != attention->width()) {
    fail_block("h is ", h, "; it must be [batch, rows, ", attention->width(), "]");
  }
  return *attention;
}

AttentionShape DecoderBlock::shape(int batch, int rows) const {
  const auto& a = *attention;
  return {batch, a.heads, a.kv_heads, rows, a.head_dim, a.head_dim};
}

} // namespace optiq
