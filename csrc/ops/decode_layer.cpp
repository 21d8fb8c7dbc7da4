#include "ops/decode_layer.h"

#include <stdexcept>

#include <mlx/primitives.h>

#include "cpu/affine_format.h"
#include "ops/fail.h"

namespace optiq {

using mx::array; // as the macros of mlx/primitives.h expect

namespace {

constexpr const char* kName = "decode_layer";

LaunchedLayer::Strides strides(const array& cache) {
  return {cache.strides()[0], cache.strides()[1], cache.strides()[2]};
}

class DecodeLayer : public mx::Primitive {
 public:
  DecodeLayer(mx::Stream stream, std::shared_ptr<LaunchedLayer> layer, TokenPlace place)
      : Primitive(stream), layer_(std::move(layer)), place_(place) {}

  void eval_cpu(const std::vector<array>&, std::vector<array>&) override {
    throw std::runtime_error("[decode_layer] has no CPU kernel; use block_step there");
  }
  void eval_gpu(const std::vector<array>& inputs, std::vector<array>& out) override;
  DEFINE_NAME(OptiqDecodeLayer)

 private:
  std::shared_ptr<LaunchedLayer> layer_;
  TokenPlace place_;
};

// Inputs: h, the layer's arrays, the caches. Outputs: h and the caches.
void DecodeLayer::eval_gpu(const std::vector<array>& inputs, std::vector<array>& out) {
  // Every output holds the inputs; the caches can only be reused if this evaluation alone does.
  for (auto& o : out) {
    if (&o.inputs() != &inputs) {
      o.inputs().clear();
    }
  }
  const array* caches = &inputs[inputs.size() - 2];
  metal::share_or_copy(caches[0], out[1], stream());
  metal::share_or_copy(caches[1], out[2], stream());
  std::lock_guard lock(layer_->mutex);
  auto [plan, compiled] = layer_->plan(
      out[0].shape(0), place_, strides(out[1]), strides(out[2]), metal::tuning(stream()));
  metal::run_again(plan, {inputs.begin(), inputs.end() - 2}, out, stream(), compiled);
}

void check_cache(const char* name, const array& cache, const launch::KvTensor& kv, const array& h,
    int kv_heads, int keys) {
  bool records = !kv.format.dense();
  int last = records ? cpu::record_words(kv.dim, kv.format) : kv.dim;
  if (cache.ndim() != 4 || cache.shape(0) != h.shape(0) || cache.shape(1) != kv_heads ||
      cache.shape(2) < keys || cache.shape(3) != last ||
      cache.dtype() != (records ? mx::uint32 : h.dtype())) {
    fail(kName, name, " ", cache.shape(), " ", cache.dtype(), " do not fit a batch of ", h.shape(0),
        ", ", kv_heads, " key heads, ", keys, " tokens and ", last, " values of ",
        records ? mx::uint32 : h.dtype());
  }
}

} // namespace

std::pair<const launch::Plan&, metal::Compiled&> LaunchedLayer::plan(int batch, TokenPlace place,
    const Strides& k_strides, const Strides& v_strides, const launch::Tuning& tuning) {
  launch::DecodeLayer op = described;
  op.attention.batch = batch;
  op.attention.keys = place.keys;
  op.attention.k.strides = k_strides;
  op.attention.v.strides = v_strides;
  op.token = place.token;
  op.position = place.position;
  auto found = kept_.find(batch);
  if (found == kept_.end()) {
    found = kept_.emplace(batch, Kept{launch::LayerPlan(op, tuning)}).first;
  }
  auto& [plan, compiled] = found->second;
  int made = plan.made();
  const launch::Plan& now = plan.at(op);
  if (plan.made() > made) {
    compiled.clear();
  }
  return {now, compiled};
}

int LaunchedLayer::plans_made() const {
  int made = 0;
  for (const auto& [batch, kept] : kept_) {
    made += kept.plan.made();
  }
  return made;
}

std::vector<array> decode_layer(const std::shared_ptr<LaunchedLayer>& layer, const array& h,
    const array& keys, const array& values, TokenPlace place, mx::StreamOrDevice s) {
  const auto& op = layer->described;
  if (h.ndim() != 3 || h.shape(1) != 1 || h.shape(2) != op.width || h.dtype() != layer->dtype) {
    fail(kName, "h is ", h.shape(), " ", h.dtype(), "; it must be [batch, 1, ", op.width, "] ",
        layer->dtype);
  }
  if (place.token < 0 || place.token >= place.keys) {
    fail(kName, "token ", place.token, " is not among ", place.keys);
  }
  check_cache("keys", keys, op.attention.k, h, op.attention.kv_heads, place.keys);
  check_cache("values", values, op.attention.v, h, op.attention.kv_heads, place.keys);
  std::vector<array> inputs = {h};
  inputs.insert(inputs.end(), layer->arrays.begin(), layer->arrays.end());
  inputs.insert(inputs.end(), {keys, values});
  return array::make_arrays({h.shape(), keys.shape(), values.shape()},
      {h.dtype(), keys.dtype(), values.dtype()},
      std::make_shared<DecodeLayer>(mx::to_stream(s), layer, place), inputs);
}

} // namespace optiq
