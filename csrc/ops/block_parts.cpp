#include "ops/block_parts.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

namespace optiq {
namespace {

cpu::HeadsOut heads_out(array& a) {
  size_t heads = a.shape(1), rows = a.shape(2), dim = a.shape(3);
  return {a.data<float>(), heads * rows * dim, rows * dim, dim};
}

// A part of a block, as one node.
class PartPrimitive : public mx::Primitive {
 public:
  PartPrimitive(mx::Stream stream, BlockPtr block) : Primitive(stream), block_(std::move(block)) {}

  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    fail_on_gpu();
  }
  DEFINE_NAME(OptiqDecoderBlock)

 protected:
  template <class F>
  void dispatch(F&& work) {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [block = block_, work = std::forward<F>(work)]() { work(*block); });
  }

  BlockPtr block_;
};

class ProjectPrimitive : public PartPrimitive {
 public:
  ProjectPrimitive(mx::Stream stream, BlockPtr block, int offset, TermsOfRows terms)
      : PartPrimitive(stream, std::move(block)), offset_(offset), terms_(std::move(terms)) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& out) override {
    array h = row_contiguous(inputs[0], stream());
    std::optional<array> offsets;
    if (inputs.size() == 2) {
      offsets = row_contiguous(inputs[1], stream());
    }
    for (auto& o : out) {
      o.set_data(mx::allocator::malloc(o.nbytes()));
    }
    dispatch([=, offset = offset_, terms = terms_, batch = h.shape(0), rows = h.shape(1),
                 hp = h.data<float>(), op = offsets ? offsets->data<int32_t>() : nullptr,
                 q = heads_out(out[0]), k = heads_out(out[1]),
                 v = heads_out(out[2])](const DecoderBlock& b) {
      std::vector<int64_t> starts(batch, offset);
      if (op) {
        starts.assign(op, op + batch);
      }
      cpu::project(*b.attention, hp, batch, rows, {starts.data()}, q, k, v, terms.get());
    });
  }

 private:
  int offset_;
  TermsOfRows terms_;
};

class AttendPrimitive : public PartPrimitive {
 public:
  AttendPrimitive(mx::Stream stream, BlockPtr block, int caches, const KeyValueLayout& layout,
      bool mlp, TermsOfRows terms)
      : PartPrimitive(stream, std::move(block)),
        caches_(caches),
        layout_(layout),
        mlp_(mlp),
        terms_(std::move(terms)) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
    array &out = outputs[0], h = row_contiguous(inputs[0], stream()),
          q = row_contiguous(inputs[1], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const array* extra = inputs.data() + 2 + 2 * caches_;
    std::vector<cpu::Attention> given(caches_);
    for (int i = 0; i < caches_; i++) {
      const array* kv = &inputs[2 + 2 * i];
      cpu::Attention& a = given[i];
      a.batch = h.shape(0) / caches_;
      a.rows = h.shape(1);
      a.keys = kv->shape(2);
      a.q = q.data<float>() + i * q.size() / caches_;
      a.q_batch = q.strides()[0], a.q_head = q.strides()[1], a.q_row = q.strides()[2];
      layout_.set(a, kv, kv + 1, extra, stream());
    }
    dispatch([given, rows = h.shape(0) * h.shape(1), hp = h.data<float>(), y = out.data<float>(),
                 mlp = mlp_, terms = terms_](const DecoderBlock& b) {
      std::vector<cpu::Attention> all = given;
      cpu::Adapters adapters = terms.get().after(b.attention->qkv.size());
      cpu::attend(*b.attention, hp, rows, all.data(), int(all.size()), y, adapters);
      if (mlp) {
        cpu::mlp(*b.mlp, y, rows, y, adapters.after(1));
      }
    });
  }

 private:
  int caches_;
  KeyValueLayout layout_;
  bool mlp_;
  TermsOfRows terms_;
};

} // namespace

std::vector<array> block_project(const BlockPtr& block, const array& h, int offset,
    const std::optional<array>& offsets, const std::vector<int>& slots, mx::StreamOrDevice s) {
  const auto& layer = block->attention_over(h);
  int batch = h.shape(0), rows = h.shape(1);
  std::vector<array> inputs = {h};
  if (offsets) {
    if (offsets->ndim() != 1 || offsets->shape(0) != batch) {
      fail_block(
          "offsets are ", offsets->shape(), "; there must be one for each of ", batch, " rows");
    }
    inputs.push_back(mx::astype(*offsets, mx::int32, s));
  }
  mx::Shape q = {batch, layer.heads, rows, layer.head_dim};
  mx::Shape k = {batch, layer.kv_heads, rows, layer.head_dim};
  return array::make_arrays({q, k, k}, {mx::float32, mx::float32, mx::float32},
      std::make_shared<ProjectPrimitive>(
          mx::to_stream(s), block, offset, block->terms(slots, batch, rows)),
      inputs);
}

array block_attend(const BlockPtr& block, const array& h, const array& q,
    const std::vector<array>& keys, const std::vector<array>& values, const KeyValues& kv, bool mlp,
    const std::vector<int>& slots, mx::StreamOrDevice s) {
  const auto& layer = block->attention_over(h, mlp);
  int batch = h.shape(0), rows = h.shape(1);
  if (q.shape() != mx::Shape{batch, layer.heads, rows, layer.head_dim} ||
      q.dtype() != mx::float32) {
    fail_block("q is ", q.shape(), " ", q.dtype(), ", not as block_project gives it");
  }
  int count = int(keys.size());
  if (values.size() != keys.size() || (count != 1 && count != batch)) {
    fail_block(count, " arrays of keys and ", values.size(), " of values for a batch of ", batch,
        "; there must be one of each, or one for each row");
  }
  if (count > 1 && (kv.mask || kv.starts || kv.first || kv.recent)) {
    fail_block("masks, starts and exact vectors do not go with keys of each row");
  }
  KeyValueLayout layout;
  AttentionShape shape = block->shape(batch / count, rows);
  std::vector<array> inputs = {h, q};
  for (int i = 0; i < count; i++) {
    layout = kv.check("decoder_block", shape, keys[i], values[i]);
    inputs.push_back(keys[i]);
    inputs.push_back(values[i]);
  }
  kv.append(inputs, s);
  return array(h.shape(), mx::float32,
      std::make_shared<AttendPrimitive>(
          mx::to_stream(s), block, count, layout, mlp, block->terms(slots, batch, rows)),
      std::move(inputs));
}

} // namespace optiq
