#include "ops/block_steps.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

namespace optiq {
namespace {

enum class Mode { project, attend, step };

struct Arguments {
  Mode mode;
  std::vector<CachePlace> places = {};
  int caches = 1, offset = 0;
  KeyValueLayout layout = {};
  bool mlp = false;
};

cpu::HeadsOut heads_out(float* data, int heads, int rows, int dim) {
  return {data, size_t(heads) * rows * dim, size_t(rows) * dim, size_t(dim)};
}

// New vectors [batch, head, row, dim], as project() gives them, into a cache from row `start` on.
void write_rows(
    const float* x, const cpu::Vectors& cache, int batch, int heads, int rows, int dim, int start) {
  for (int i = 0; i < batch * heads; i++, x += size_t(rows) * dim) {
    size_t at = i / heads * cache.batch + i % heads * cache.head + start * cache.row;
    if (cache.format.dense()) {
      auto* to = static_cast<float*>(const_cast<void*>(cache.data)) + at;
      for (int r = 0; r < rows; r++) {
        std::copy_n(x + size_t(r) * dim, dim, to + r * cache.row);
      }
    } else {
      auto* to = static_cast<uint32_t*>(const_cast<void*>(cache.data)) + at;
      cpu::kernels().quantize_kv({x, cpu::Float::f32, to, size_t(rows), dim, cache.format});
    }
  }
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
  void attend(const std::vector<array>& inputs, array& out);
  void step(const std::vector<array>& inputs, std::vector<array>& out);
  void cache(const array& in, array& out);

  template <class F>
  void dispatch(F&& work) {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [block = block_, work = std::forward<F>(work)]() { work(*block); });
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
  if (args_.mode == Mode::project) {
    std::optional<array> offsets;
    if (inputs.size() == 2) {
      offsets = row_contiguous(inputs[1], stream());
    }
    return project(row_contiguous(inputs[0], stream()), offsets, outputs);
  }
  outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
  attend(inputs, outputs[0]);
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

void BlockPrimitive::attend(const std::vector<array>& inputs, array& out) {
  array h = row_contiguous(inputs[0], stream()), q = row_contiguous(inputs[1], stream());
  int count = args_.caches, rows = h.shape(0) * h.shape(1);
  const array* extra = inputs.data() + 2 + 2 * count;
  std::vector<cpu::Attention> given(count);
  for (int i = 0; i < count; i++) {
    const array* kv = &inputs[2 + 2 * i];
    cpu::Attention& a = given[i];
    a.batch = h.shape(0) / count;
    a.rows = h.shape(1);
    a.keys = kv->shape(2);
    a.q = q.data<float>() + i * q.size() / count;
    a.q_batch = q.strides()[0], a.q_head = q.strides()[1], a.q_row = q.strides()[2];
    args_.layout.set(a, kv, kv + 1, extra, stream());
  }
  dispatch([given, rows, hp = h.data<float>(), y = out.data<float>(), mlp = args_.mlp](
               const DecoderBlock& b) {
    std::vector<cpu::Attention> all = given;
    cpu::attend(*b.attention, hp, rows, all.data(), int(all.size()), y);
    if (mlp) {
      cpu::mlp(*b.mlp, y, rows, y);
    }
  });
}

// The new cache is the old one's memory if no other array shares it.
void BlockPrimitive::cache(const array& in, array& out) {
  // MLX holds what a step gave until the step is over, and with async_eval the next step is
  // scheduled before that. That does not count as sharing: the next step runs later and also holds
  // the memory until it is over. So the memory moves to a reference of its own, and MLX keeps an
  // empty one. A cache is copied without need only in the moment after a step has ended and before
  // MLX lets go.
  if (const auto& data = in.data_shared_ptr(); block_->given.to_one(data)) {
    array(in).set_data(std::move(*data), in.data_size(), in.strides(), in.flags(), in.offset());
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
  int count = int(args_.places.size()), share = batch / count; // batch entries of each cache
  out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  bool cached = out.size() > 1;
  for (size_t i = 1; i < out.size(); i++) {
    cache(inputs[i], out[i]);
  }
  std::vector<cpu::Attention> given(count);
  for (int i = 0; i < count; i++) {
    given[i].batch = share;
    given[i].rows = rows;
    given[i].keys = args_.places[i].length;
    const array* kv = cached ? &out[1 + 2 * i] : nullptr;
    args_.layout.set(given[i], kv, kv ? kv + 1 : nullptr, inputs.data() + out.size(), stream());
  }
  Given::Caches caches;
  for (size_t i = 1; i < out.size(); i++) {
    if (&out[i].inputs() != &inputs) { // of all outputs MLX does not hold the one it evaluates
      caches.push_back(out[i].data_shared_ptr().get());
    }
  }
  block_->given.add(caches);
  dispatch([=, places = args_.places, mlp = args_.mlp, hp = h.data<float>(),
               y = out[0].data<float>()](DecoderBlock& b) {
    struct AtTheEnd {
      Given& given;
      const Given::Caches& caches;
      ~AtTheEnd() {
        given.remove(caches);
      }
    } at_the_end{b.given, caches};
    const auto& layer = *b.attention;
    std::vector<cpu::Attention> all = given;
    size_t m = size_t(batch) * rows, q_size = m * layer.heads * dim, kv_size = m * kv_heads * dim;
    std::unique_ptr<float[]> own(new float[q_size + 2 * kv_size]);
    float* q = own.get();
    float* kv[2] = {q + q_size, q + q_size + kv_size};
    cpu::HeadsOut to[2];
    bool direct[2]; // project() writes into the cache
    for (int i = 0; i < 2; i++) {
      const cpu::Vectors& x = i == 0 ? all[0].k : all[0].v;
      direct[i] = cached && count == 1 && x.format.dense();
      to[i] = heads_out(kv[i], kv_heads, rows, dim);
      if (direct[i]) {
        float* data = static_cast<float*>(const_cast<void*>(x.data));
        to[i] = {data + places[0].start * x.row, x.batch, x.head, x.row};
      }
    }
    std::vector<int64_t> starts(batch);
    for (int i = 0; i < batch; i++) {
      starts[i] = places[i / share].offset;
    }
    cpu::project(layer, hp, batch, rows, {starts.data()}, heads_out(q, layer.heads, rows, dim),
        to[0], to[1]);
    for (int c = 0; c < count; c++) {
      cpu::Attention& a = all[c];
      for (int i = 0; i < 2; i++) {
        cpu::Vectors& x = i == 0 ? a.k : a.v;
        const float* from = kv[i] + c * kv_size / count;
        if (!cached) {
          x = {from, cpu::Float::f32, {}, to[i].batch, to[i].head, to[i].row};
        } else if (!direct[i]) {
          write_rows(from, x, share, kv_heads, rows, dim, places[c].start);
        }
      }
      a.q = q + c * q_size / count;
      a.q_batch = size_t(layer.heads) * rows * dim, a.q_head = size_t(rows) * dim, a.q_row = dim;
    }
    cpu::attend(layer, hp, int(m), all.data(), count, y);
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

const cpu::AttentionLayer& attention_of(const BlockPtr& block, bool mlp) {
  if (!block->attention || (mlp && !block->mlp)) {
    fail_block("the block has no ", block->attention ? "MLP" : "attention");
  }
  return *block->attention;
}

AttentionShape shape_of(const cpu::AttentionLayer& layer, const array& h) {
  return {h.shape(0), layer.heads, layer.kv_heads, h.shape(1), layer.head_dim, layer.head_dim};
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

array block_attend(const BlockPtr& block, const array& h, const array& q,
    const std::vector<array>& keys, const std::vector<array>& values, const KeyValues& kv, bool mlp,
    mx::StreamOrDevice s) {
  const auto& layer = attention_of(block, mlp);
  checked_hidden(h, layer.width());
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
  Arguments args{.mode = Mode::attend, .caches = count, .mlp = mlp};
  AttentionShape shape = shape_of(layer, h);
  shape.batch = batch / count;
  std::vector<array> inputs = {h, q};
  for (int i = 0; i < count; i++) {
    args.layout = kv.check("decoder_block", shape, keys[i], values[i]);
    inputs.push_back(keys[i]);
    inputs.push_back(values[i]);
  }
  kv.append(inputs, s);
  return array(h.shape(), mx::float32,
      std::make_shared<BlockPrimitive>(mx::to_stream(s), block, args), std::move(inputs));
}

std::vector<array> block_step(const BlockPtr& block, const array& h, const std::vector<array>& keys,
    const std::vector<array>& values, const std::vector<CachePlace>& places, const KeyValues& kv,
    bool mlp, mx::StreamOrDevice s) {
  const auto& layer = attention_of(block, mlp);
  checked_hidden(h, layer.width());
  int batch = h.shape(0), rows = h.shape(1), count = int(places.size());
  if (count == 0 || batch % count != 0 || (count > 1 && count != batch)) {
    fail_block(count, " places for a batch of ", batch, "; there must be one, or one for each row");
  }
  if (keys.size() != values.size() || (!keys.empty() && int(keys.size()) != count) ||
      (keys.empty() && count > 1)) {
    fail_block(
        keys.size(), " caches of keys and ", values.size(), " of values for ", count, " places");
  }
  if (count > 1 && kv.mask) {
    fail_block("a mask does not go with caches of each row");
  }
  Arguments args{.mode = Mode::step, .places = places, .mlp = mlp};
  AttentionShape shape = shape_of(layer, h);
  shape.batch = batch / count;
  std::vector<array> inputs = {h};
  std::vector<mx::Shape> shapes = {h.shape()};
  std::vector<mx::Dtype> dtypes = {mx::float32};
  for (size_t i = 0; i < keys.size(); i++) {
    const auto& [start, length, offset] = places[i];
    args.layout = kv.check("decoder_block", shape, keys[i], values[i], length);
    for (const auto* cache : {&keys[i], &values[i]}) {
      if (cache->dtype() != mx::float32 && cache->dtype() != mx::uint32) {
        fail_block("a cache is ", cache->dtype(), "; it must be float32, or uint32 records");
      }
      inputs.push_back(*cache);
      shapes.push_back(cache->shape());
      dtypes.push_back(cache->dtype());
    }
    if (start < 0 || start + rows > length || length > keys[i].shape(2)) {
      fail_block("rows ", start, " to ", start + rows, " of ", length, " do not fit a cache of ",
          keys[i].shape(2));
    }
  }
  if (keys.empty()) {
    args.places[0].start = 0;
    args.places[0].length = rows;
    args.layout = kv.check("decoder_block", shape, rows);
  }
  kv.append(inputs, s);
  return array::make_arrays(std::move(shapes), dtypes,
      std::make_shared<BlockPrimitive>(mx::to_stream(s), block, args), inputs);
}

} // namespace optiq
