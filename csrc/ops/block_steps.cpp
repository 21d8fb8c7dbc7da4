#include "ops/block_steps.h"

#include <chrono>
#include <thread>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

namespace optiq {
namespace {

enum class Mode { project, attend, step, mlp };

struct Arguments {
  Mode mode;
  int start = 0, length = 0, offset = 0;
  cpu::Masking masking = cpu::Masking::none;
  bool mlp = false;
};

cpu::HeadsOut heads_out(float* data, int heads, int rows, int dim) {
  return {data, size_t(heads) * rows * dim, size_t(rows) * dim, size_t(dim)};
}

void set_mask(cpu::Attention& a, const array& mask, cpu::Masking masking) {
  a.masking = masking;
  a.mask = mask.data<char>();
  a.mask_type = masking == cpu::Masking::additive ? float_type(mask.dtype()) : cpu::Float::f32;
  for (int axis = 0; axis < 4; axis++) {
    int own = axis - 4 + int(mask.ndim());
    a.mask_strides[axis] = own < 0 || mask.shape(own) == 1 ? 0 : mask.strides()[own];
  }
}

void set_keys(cpu::Attention& a, const array& k, const array& v, int keys) {
  a.k = k.data<char>();
  a.v = v.data<char>();
  a.type = float_type(k.dtype());
  a.keys = keys;
  a.k_batch = k.strides()[0], a.k_head = k.strides()[1], a.k_row = k.strides()[2];
  a.v_batch = v.strides()[0], a.v_head = v.strides()[1], a.v_row = v.strides()[2];
}

class BlockPrimitive : public mx::Primitive {
 public:
  BlockPrimitive(mx::Stream stream, BlockPtr block, Arguments arguments)
      : Primitive(stream), block_(std::move(block)), args_(arguments) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override;
  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    throw std::runtime_error("[decoder_block] has no GPU kernel; run the block's layers there");
  }
  DEFINE_NAME(OptiqDecoderBlock)

 private:
  void project(const array& h, const std::optional<array>& offsets, std::vector<array>& out);
  void attend(const std::vector<array>& in, array& out);
  void step(const std::vector<array>& inputs, std::vector<array>& out);
  void cache(const array& in, array& out);

  template <class F>
  void dispatch(F&& work) {
    block_->running++;
    mx::cpu::get_command_encoder(stream()).dispatch(
        [block = block_, work = std::forward<F>(work)]() {
          work(*block);
          block->running--;
        });
  }

  BlockPtr block_;
  Arguments args_;
};

void BlockPrimitive::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  // Every output holds the inputs; the caches can only be reused if this evaluation alone does.
  for (auto& out : outputs) {
    if (&out.inputs() != &inputs) {
      out.inputs().clear();
    }
  }
  if (args_.mode == Mode::step) {
    return step(inputs, outputs);
  }
  std::vector<array> in = {row_contiguous(inputs[0], stream())};
  for (size_t i = 1; i < inputs.size(); i++) {
    bool strided = i == 4 || (i >= 2 && inputs[i].strides().back() == 1); // a mask, keys, values
    in.push_back(strided ? inputs[i] : row_contiguous(inputs[i], stream()));
  }
  if (args_.mode == Mode::project) {
    std::optional<array> offsets;
    if (in.size() == 2) {
      offsets = in[1];
    }
    return project(in[0], offsets, outputs);
  }
  array& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (args_.mode == Mode::attend) {
    return attend(in, out);
  }
  dispatch([h = in[0].data<float>(), y = out.data<float>(), rows = in[0].size() / in[0].shape(-1)](
               const DecoderBlock& b) { cpu::mlp(*b.mlp, h, int(rows), y); });
}

void BlockPrimitive::project(
    const array& h, const std::optional<array>& offsets, std::vector<array>& out) {
  for (auto& o : out) {
    o.set_data(mx::allocator::malloc(o.nbytes()));
  }
  const auto& layer = *block_->attention;
  int batch = h.shape(0), rows = h.shape(1), dim = layer.head_dim;
  cpu::HeadsOut q = heads_out(out[0].data<float>(), layer.heads, rows, dim);
  cpu::HeadsOut k = heads_out(out[1].data<float>(), layer.kv_heads, rows, dim);
  cpu::HeadsOut v = heads_out(out[2].data<float>(), layer.kv_heads, rows, dim);
  dispatch([=, offset = args_.offset, hp = h.data<float>(),
               op = offsets ? offsets->data<int32_t>() : nullptr](const DecoderBlock& b) {
    std::vector<int64_t> starts(batch, offset);
    if (op) {
      starts.assign(op, op + batch);
    }
    cpu::project(*b.attention, hp, batch, rows, {starts.data()}, q, k, v);
  });
}

void BlockPrimitive::attend(const std::vector<array>& in, array& out) {
  const array &h = in[0], &q = in[1];
  cpu::Attention a{};
  a.batch = h.shape(0);
  a.rows = h.shape(1);
  a.q = q.data<float>();
  a.q_batch = q.strides()[0], a.q_head = q.strides()[1], a.q_row = q.strides()[2];
  set_keys(a, in[2], in[3], in[2].shape(2));
  a.masking = args_.masking;
  if (in.size() == 5) {
    set_mask(a, in[4], args_.masking);
  }
  dispatch(
      [a, hp = h.data<float>(), y = out.data<float>(), mlp = args_.mlp](const DecoderBlock& b) {
        cpu::attend(*b.attention, hp, a, y);
        if (mlp) {
          cpu::mlp(*b.mlp, y, a.batch * a.rows, y);
        }
      });
}

// The new cache is the old one's memory if no other array shares it. An earlier step that is still
// scheduled holds it, too: wait for that, it runs long before the step being scheduled here.
void BlockPrimitive::cache(const array& in, array& out) {
  using namespace std::chrono_literals;
  for (int tries = 0; !in.is_donatable() && tries < 5000 && block_->running > 0; tries++) {
    std::this_thread::sleep_for(20us);
  }
  for (int tries = 0; !in.is_donatable() && in.data_shared_ptr().use_count() > 1 && tries < 50;
      tries++) { // done, but its references may be a moment behind
    std::this_thread::yield();
  }
  if (in.is_donatable() && in.flags().row_contiguous) {
    out.copy_shared_buffer(in);
    return;
  }
  array from = row_contiguous(in, stream());
  if (from.id() != in.id()) {
    out.copy_shared_buffer(from);
    return;
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  mx::cpu::get_command_encoder(stream()).dispatch(
      [from = in.data<char>(), to = out.data<char>(), n = in.nbytes()] {
        std::copy_n(from, n, to);
      });
}

void BlockPrimitive::step(const std::vector<array>& inputs, std::vector<array>& out) {
  const auto& layer = *block_->attention;
  array h = row_contiguous(inputs[0], stream());
  int batch = h.shape(0), rows = h.shape(1), dim = layer.head_dim, kv_heads = layer.kv_heads;
  cpu::Attention given{};
  given.batch = batch;
  given.rows = rows;
  given.masking = args_.masking;
  if (inputs.size() % 2 == 0) {
    set_mask(given, inputs.back(), args_.masking);
  }
  out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  bool cached = out.size() == 3;
  if (cached) {
    cache(inputs[1], out[1]);
    cache(inputs[2], out[2]);
    set_keys(given, out[1], out[2], args_.length);
  }
  dispatch([=, offset = args_.offset, start = args_.start, mlp = args_.mlp, hp = h.data<float>(),
               y = out[0].data<float>()](const DecoderBlock& b) {
    const auto& layer = *b.attention;
    cpu::Attention a = given;
    size_t m = size_t(batch) * rows, kv = cached ? 0 : m * kv_heads * dim;
    std::unique_ptr<float[]> own(new float[m * layer.heads * dim + 2 * kv]);
    float* keys = own.get() + m * layer.heads * dim;
    if (!cached) {
      a.type = cpu::Float::f32;
      a.keys = rows;
      a.k = keys;
      a.v = keys + kv;
      a.k_batch = a.v_batch = size_t(kv_heads) * rows * dim;
      a.k_head = a.v_head = size_t(rows) * dim;
      a.k_row = a.v_row = dim;
    }
    cpu::HeadsOut q = heads_out(own.get(), layer.heads, rows, dim);
    auto to = [&](const void* cache, size_t b, size_t h, size_t r) {
      float* data = static_cast<float*>(const_cast<void*>(cache));
      return cpu::HeadsOut{data + start * r, b, h, r};
    };
    std::vector<int64_t> starts(batch, offset);
    cpu::project(layer, hp, batch, rows, {starts.data()}, q, to(a.k, a.k_batch, a.k_head, a.k_row),
        to(a.v, a.v_batch, a.v_head, a.v_row));
    a.q = own.get();
    a.q_batch = q.batch, a.q_head = q.head, a.q_row = q.row;
    cpu::attend(layer, hp, a, y);
    if (mlp) {
      cpu::mlp(*b.mlp, y, int(m), y);
    }
  });
}

const array& checked_hidden(const array& h, int width) {
  if (h.ndim() != 3 || h.shape(2) != width || h.dtype() != mx::float32) {
    fail_block(
        "h is ", h.shape(), " ", h.dtype(), "; it must be [batch, rows, ", width, "] float32");
  }
  return h;
}

cpu::Masking masking_of(const std::string& name, const std::optional<array>& mask, int batch,
    int heads, int rows, int keys) {
  if (!mask) {
    if (name != "" && name != "causal") {
      fail_block("masking is '", name, "'; it must be '' or 'causal' without a mask");
    }
    return name == "causal" && rows > 1 ? cpu::Masking::causal : cpu::Masking::none;
  }
  const int full[4] = {batch, heads, rows, keys};
  bool fits = mask->ndim() <= 4 && mask->ndim() > 0;
  for (int axis = 0; fits && axis < int(mask->ndim()); axis++) {
    int n = mask->shape(axis);
    fits = n == 1 || n == full[4 - int(mask->ndim()) + axis];
  }
  if (!fits) {
    fail_block("mask ", mask->shape(), " does not broadcast to [", batch, ", ", heads, ", ", rows,
        ", ", keys, "]");
  }
  if (mask->dtype() == mx::bool_) {
    return cpu::Masking::boolean;
  }
  require_floating("decoder_block", "mask", *mask);
  return cpu::Masking::additive;
}

const cpu::AttentionLayer& attention_of(const BlockPtr& block, bool mlp) {
  if (!block->attention || (mlp && !block->mlp)) {
    fail_block("the block has no ", block->attention ? "MLP" : "attention");
  }
  return *block->attention;
}

} // namespace

std::vector<array> block_project(const BlockPtr& block, const array& h, int offset,
    const std::optional<array>& offsets, mx::StreamOrDevice s) {
  const auto& layer = attention_of(block, false);
  checked_hidden(h, layer.width());
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
  Arguments args{.mode = Mode::project, .offset = offset};
  return array::make_arrays({q, k, k}, {mx::float32, mx::float32, mx::float32},
      std::make_shared<BlockPrimitive>(mx::to_stream(s), block, args), inputs);
}

array block_attend(const BlockPtr& block, const array& h, const array& q, const array& k,
    const array& v, const std::string& masking, const std::optional<array>& mask, bool mlp,
    mx::StreamOrDevice s) {
  const auto& layer = attention_of(block, mlp);
  checked_hidden(h, layer.width());
  int batch = h.shape(0), rows = h.shape(1);
  if (q.shape() != mx::Shape{batch, layer.heads, rows, layer.head_dim} ||
      q.dtype() != mx::float32) {
    fail_block("q is ", q.shape(), " ", q.dtype(), ", not as block_project gives it");
  }
  require_floating("decoder_block", "k", k);
  if (k.ndim() != 4 || k.shape() != v.shape() || k.dtype() != v.dtype() || k.shape(0) != batch ||
      k.shape(1) != layer.kv_heads || k.shape(3) != layer.head_dim || k.shape(2) == 0) {
    fail_block("k ", k.shape(), " ", k.dtype(), " and v ", v.shape(), " ", v.dtype(),
        " do not fit a block of ", layer.kv_heads, " key heads of ", layer.head_dim);
  }
  Arguments args{.mode = Mode::attend, .mlp = mlp};
  args.masking = masking_of(masking, mask, batch, layer.heads, rows, k.shape(2));
  std::vector<array> inputs = {h, q, k, v};
  if (mask) {
    inputs.push_back(*mask);
  }
  return array(h.shape(), mx::float32,
      std::make_shared<BlockPrimitive>(mx::to_stream(s), block, args), std::move(inputs));
}

std::vector<array> block_step(const BlockPtr& block, const array& h,
    const std::optional<array>& keys, const std::optional<array>& values, int start, int length,
    int offset, const std::string& masking, const std::optional<array>& mask, bool mlp,
    mx::StreamOrDevice s) {
  const auto& layer = attention_of(block, mlp);
  checked_hidden(h, layer.width());
  int batch = h.shape(0), rows = h.shape(1);
  std::vector<array> inputs = {h};
  std::vector<mx::Shape> shapes = {h.shape()};
  if (keys && values) {
    for (const auto& cache : {*keys, *values}) {
      if (cache.ndim() != 4 || cache.shape(0) != batch || cache.shape(1) != layer.kv_heads ||
          cache.shape(3) != layer.head_dim || cache.dtype() != mx::float32 ||
          cache.shape() != keys->shape()) {
        fail_block("a cache is ", cache.shape(), " ", cache.dtype(), "; it must be [", batch, ", ",
            layer.kv_heads, ", rows, ", layer.head_dim, "] float32");
      }
      inputs.push_back(cache);
      shapes.push_back(cache.shape());
    }
    if (start < 0 || start + rows > length || length > keys->shape(2)) {
      fail_block("rows ", start, " to ", start + rows, " of ", length, " do not fit a cache of ",
          keys->shape(2));
    }
  } else {
    start = 0;
    length = rows;
  }
  Arguments args{
      .mode = Mode::step, .start = start, .length = length, .offset = offset, .mlp = mlp};
  args.masking = masking_of(masking, mask, batch, layer.heads, rows, length);
  if (mask) {
    inputs.push_back(*mask);
  }
  std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  return array::make_arrays(std::move(shapes), dtypes,
      std::make_shared<BlockPrimitive>(mx::to_stream(s), block, args), inputs);
}

array block_mlp(const BlockPtr& block, const array& h, mx::StreamOrDevice s) {
  if (!block->mlp) {
    fail_block("the block has no MLP");
  }
  checked_hidden(h, block->mlp->down.w.rows);
  return array(h.shape(), mx::float32,
      std::make_shared<BlockPrimitive>(
          mx::to_stream(s), block, Arguments{.mode = Mode::mlp, .mlp = true}),
      {h});
}

} // namespace optiq
