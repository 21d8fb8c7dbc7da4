#include "ops/block_steps.h"

#include "cpu/memory.h"

#include <algorithm>
#include <limits>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

namespace optiq {
namespace {

cpu::HeadsOut heads_out(float* data, int heads, int rows, int dim) {
  return {data, size_t(heads) * rows * dim, size_t(rows) * dim, size_t(dim)};
}

// New vectors, as project() gives them, into a cache from row `start` on.
void write_rows(const cpu::HeadsOut& x, const cpu::Vectors& cache, int batch, int heads, int rows,
    int dim, int start) {
  bool records = !cache.format.dense();
  int step = records && x.row == size_t(dim) ? rows : 1; // at a time
  cpu::Buffer<float> one(dim);
  for (int i = 0; i < batch * heads * rows; i += step) {
    int r = i % rows, head = i / rows % heads, b = i / rows / heads;
    const float* from = x.data + b * x.batch + head * x.head + r * x.row;
    size_t at = b * cache.batch + head * cache.head + (start + r) * cache.row;
    if (records) {
      auto* to = static_cast<uint32_t*>(const_cast<void*>(cache.data)) + at;
      cpu::kernels().quantize_kv({from, cpu::Float::f32, to, size_t(step), dim, cache.format});
      continue;
    }
    auto* to = static_cast<char*>(const_cast<void*>(cache.data)) + at * cpu::size_of(cache.type);
    float top = cache.type == cpu::Float::f16 ? 65504.0f : std::numeric_limits<float>::infinity();
    std::transform(
        from, from + dim, one.get(), [=](float value) { return std::clamp(value, -top, top); });
    cpu::kernels().from_f32(one.get(), cache.type, to, dim);
  }
}

// What a block does.
struct Step {
  BlockPtr block;
  KeyValueLayout layout;
  std::vector<CachePlace> places;
  bool ragged; // batch entries are rows of the caches
  TermsOfRows terms;

  // Of each cache; keys and values are at kv, or new where there is none.
  std::vector<cpu::Attention> attentions(
      int batch, const array* kv, const array* extra, mx::Stream stream) const {
    std::vector<cpu::Attention> all(places.size());
    for (size_t i = 0; i < all.size(); i++) {
      all[i].batch = ragged ? 1 : batch;
      all[i].rows = places[i].rows;
      all[i].keys = places[i].length;
      layout.set(all[i], kv ? kv + 2 * i : nullptr, kv ? kv + 2 * i + 1 : nullptr, extra, stream);
      if (ragged && places[i].rows > 1) {
        all[i].masking = cpu::Masking::causal;
      }
    }
    return all;
  }
};

// The new rows of a block, attention over all, and the MLP. `all` are the attentions of the caches,
// with their keys and values; without a cache they are the new ones.
void take(const Step& step, std::vector<cpu::Attention> all, bool cached, const float* h, int batch,
    int rows, bool mlp, float* y) {
  const auto& layer = *step.block->attention;
  int dim = layer.head_dim, kv_heads = layer.kv_heads, count = int(all.size());
  size_t m = size_t(batch) * rows, q_size = m * layer.heads * dim, kv_size = m * kv_heads * dim;
  cpu::Buffer<float> own(q_size + 2 * kv_size);
  float* q = own.get();
  float* kv[2] = {q + q_size, q + q_size + kv_size};
  cpu::HeadsOut to[2];
  bool direct[2]; // project() writes into the cache
  for (int i = 0; i < 2; i++) {
    const cpu::Vectors& x = i == 0 ? all[0].k : all[0].v;
    direct[i] = cached && !step.ragged && x.format.dense() && x.type == cpu::Float::f32;
    to[i] = heads_out(kv[i], kv_heads, rows, dim);
    if (direct[i]) {
      float* data = static_cast<float*>(const_cast<void*>(x.data));
      to[i] = {data + step.places[0].start * x.row, x.batch, x.head, x.row};
    }
  }
  std::vector<int64_t> starts(batch, step.places[0].offset);
  for (int c = 0, i = 0; step.ragged && c < count; c++) {
    for (int r = 0; r < step.places[c].rows; r++) {
      starts[i++] = step.places[c].offset + r;
    }
  }
  cpu::HeadsOut queries = heads_out(q, layer.heads, rows, dim);
  cpu::Adapters adapters = step.terms.get();
  cpu::project(layer, h, batch, rows, {starts.data()}, queries, to[0], to[1], adapters);
  size_t first = 0; // batch entry of a cache
  for (int c = 0; c < count; c++) {
    cpu::Attention& a = all[c];
    const auto& [start, length, offset, own] = step.places[c];
    auto of_cache = [&](cpu::HeadsOut x) {
      x.data += first * x.batch;
      x.row = step.ragged ? x.batch : x.row; // its rows are batch entries
      return x;
    };
    for (int i = 0; i < 2; i++) {
      cpu::Vectors& x = i == 0 ? a.k : a.v;
      cpu::HeadsOut from = of_cache(to[i]);
      if (!cached) {
        x = {from.data, cpu::Float::f32, {}, from.batch, from.head, from.row};
      } else if (!direct[i]) {
        write_rows(from, x, a.batch, kv_heads, own, dim, start);
      }
    }
    cpu::HeadsOut from = of_cache(queries);
    a.q = from.data, a.q_batch = from.batch, a.q_head = from.head, a.q_row = from.row;
    first += own;
  }
  adapters = adapters.after(layer.qkv.size());
  cpu::attend(layer, h, int(m), all.data(), count, y, adapters);
  if (mlp) {
    cpu::mlp(*step.block->mlp, y, int(m), y, adapters.after(1));
  }
}

class StepPrimitive : public mx::Primitive {
 public:
  StepPrimitive(mx::Stream stream, Step step, bool cached, bool mlp)
      : Primitive(stream), step_(std::move(step)), cached_(cached), mlp_(mlp) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& out) override;
  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    fail_on_gpu();
  }
  DEFINE_NAME(OptiqDecoderBlock)

 private:
  void cache(const array& in, array& out);

  Step step_;
  bool cached_, mlp_;
};

// The new cache is the old one's memory if no other array shares it.
void StepPrimitive::cache(const array& in, array& out) {
  // MLX holds what a step gave until the step is over, and with async_eval the next step is
  // scheduled before that. That does not count as sharing: the next step runs later and also holds
  // the memory until it is over. So the memory moves to a reference of its own, and MLX keeps an
  // empty one. A cache is copied without need only in the moment after a step has ended and before
  // MLX lets go.
  if (const auto& data = in.data_shared_ptr(); step_.block->given.to_one(data)) {
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

void StepPrimitive::eval_cpu(const std::vector<array>& inputs, std::vector<array>& out) {
  // Every output holds the inputs; the caches can only be reused if this evaluation alone does.
  for (auto& o : out) {
    if (&o.inputs() != &inputs) {
      o.inputs().clear();
    }
  }
  array h = row_contiguous(inputs[0], stream());
  out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  Given::Caches caches;
  for (size_t i = 1; i < out.size(); i++) {
    cache(inputs[i], out[i]);
    if (&out[i].inputs() != &inputs) { // MLX does not hold the output that it evaluates
      caches.push_back(out[i].data_shared_ptr().get());
    }
  }
  step_.block->given.add(caches);
  int batch = h.shape(0), rows = h.shape(1);
  auto given =
      step_.attentions(batch, cached_ ? &out[1] : nullptr, inputs.data() + out.size(), stream());
  mx::cpu::get_command_encoder(stream()).dispatch(
      [=, step = step_, cached = cached_, mlp = mlp_, h = h.data<float>(),
          y = out[0].data<float>()]() {
        struct AtTheEnd {
          Given& given;
          const Given::Caches& caches;
          ~AtTheEnd() {
            given.remove(caches);
          }
        } at_the_end{step.block->given, caches};
        take(step, given, cached, h, batch, rows, mlp, y);
      });
}

// Holds the caches, which are evaluated already. So they are not inputs, and MLX has one node with
// one output.
struct Stack {
  EndsPtr ends; // or null
  std::vector<Step> steps;
  std::vector<array> caches;
};

class StackPrimitive : public mx::Primitive {
 public:
  StackPrimitive(mx::Stream stream, Stack stack)
      : Primitive(stream), stack_(std::make_shared<Stack>(std::move(stack))) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& out) override {
    array in = row_contiguous(inputs[0], stream());
    out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [stack = stack_, stream = stream(), batch = in.shape(0), rows = in.shape(1),
            in = in.data<char>(), y = out[0].data<float>()] {
          size_t m = size_t(batch) * rows;
          auto* h = reinterpret_cast<const float*>(in);
          if (stack->ends) {
            stack->ends->embed(reinterpret_cast<const int32_t*>(in), m, y);
            h = y;
          }
          const array* kv = stack->caches.data();
          for (const Step& step : stack->steps) {
            take(step, step.attentions(batch, kv, nullptr, stream), true, h, batch, rows, true, y);
            h = y;
            kv += 2 * step.places.size();
          }
          if (stack->ends) {
            stack->ends->norm(y, m);
          }
        });
  }
  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    fail_on_gpu();
  }
  DEFINE_NAME(OptiqDecoderStack)

 private:
  std::shared_ptr<const Stack> stack_;
};

Step checked(const BlockStep& given, const mx::Shape& h, bool mlp) {
  const auto& [block, keys, values, places, kv, slots] = given;
  block->attention_over(h, mlp);
  int batch = h[0], rows = h[1], count = int(places.size());
  int all = 0;
  for (const CachePlace& place : places) {
    if (place.rows < 1) {
      fail_block("a place has ", place.rows, " rows; it must have one or more");
    }
    all += place.rows;
  }
  bool ragged = count > 1 || all != rows;
  if (ragged && (rows != 1 || all != batch)) {
    fail_block(count, " places with ", all, " rows do not fit h ", h);
  }
  if (keys.size() != values.size() || (!keys.empty() && int(keys.size()) != count) ||
      (keys.empty() && count > 1)) {
    fail_block(
        keys.size(), " caches of keys and ", values.size(), " of values for ", count, " places");
  }
  if (ragged && kv.mask) {
    fail_block("a mask does not go with caches of each row");
  }
  Step step{block, {}, places, ragged, block->terms(slots, batch, rows)};
  AttentionShape shape = block->shape(ragged ? 1 : batch, rows);
  for (size_t i = 0; i < keys.size(); i++) {
    const auto& [start, length, offset, own] = places[i];
    step.layout = kv.check("decoder_block", shape, keys[i], values[i], length);
    for (const auto* cache : {&keys[i], &values[i]}) {
      if (cache->dtype() != mx::float32 && cache->dtype() != mx::float16 &&
          cache->dtype() != mx::uint32) {
        fail_block(
            "a cache is ", cache->dtype(), "; it must be float32, float16 or uint32 records");
      }
    }
    if (start < 0 || start + own > length || length > keys[i].shape(2)) {
      fail_block("rows ", start, " to ", start + own, " of ", length, " do not fit a cache of ",
          keys[i].shape(2));
    }
  }
  if (keys.empty()) {
    step.places[0].start = 0;
    step.places[0].length = rows;
    step.layout = kv.check("decoder_block", shape, rows);
  }
  return step;
}

// Keys and values in turn.
void append_caches(const BlockStep& given, std::vector<array>& to) {
  for (size_t i = 0; i < given.keys.size(); i++) {
    to.push_back(given.keys[i]);
    to.push_back(given.values[i]);
  }
}

} // namespace

std::vector<array> block_step(
    const BlockStep& given, const array& h, bool mlp, mx::StreamOrDevice s) {
  given.block->attention_over(h, mlp);
  Step step = checked(given, h.shape(), mlp);
  std::vector<array> inputs = {h};
  append_caches(given, inputs);
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const array& a : inputs) {
    shapes.push_back(a.shape());
    dtypes.push_back(a.dtype());
  }
  given.kv.append(inputs, s);
  return array::make_arrays(std::move(shapes), dtypes,
      std::make_shared<StepPrimitive>(mx::to_stream(s), std::move(step), !given.keys.empty(), mlp),
      inputs);
}

array block_stack(const std::vector<BlockStep>& given, const array& in, const EndsPtr& ends,
    mx::StreamOrDevice s) {
  Stack stack{ends, {}, {}};
  mx::Shape shape = in.shape();
  if (ends && (shape.size() != 2 || !mx::issubdtype(in.dtype(), mx::integer))) {
    fail_block("tokens are ", shape, " ", in.dtype(), "; they must be [batch, rows] integers");
  }
  if (ends) {
    shape.push_back(ends->width());
  } else if (in.dtype() != mx::float32) {
    fail_block("h is ", in.dtype(), "; it must be float32");
  }
  stack.steps.reserve(given.size());
  for (const BlockStep& each : given) {
    if (each.keys.empty() || each.kv.mask) {
      fail_block("a stack needs caches, and takes no mask");
    }
    stack.steps.push_back(checked(each, shape, true));
    append_caches(each, stack.caches);
  }
  for (const array& cache : stack.caches) {
    if (!cache.is_available() || !cache.flags().row_contiguous) {
      fail_block("a stack writes into its caches; each must be evaluated and contiguous");
    }
  }
  return array(shape, mx::float32,
      std::make_shared<StackPrimitive>(mx::to_stream(s), std::move(stack)),
      {ends ? mx::astype(in, mx::int32, s) : in});
}

} // namespace optiq
