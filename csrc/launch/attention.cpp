#include "launch/attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../metal/kv_shape.h"
#include "cpu/affine_format.h"
#include "launch/instantiate.h"

namespace optiq::launch {

namespace {

using Kind = Argument::Kind;

constexpr int kMaxDim = 256;
constexpr int kSimdgroups = 4; // as in metal/softmax.h
constexpr int kTileKeys = 32;  // and in metal/attention.h
constexpr int kTileBytes = kSimdgroups * 16 * (64 + 4) * 4;
constexpr int kThreadgroupMemory = 32 * 1024;
constexpr int kDecodeRows = 32; // queries up to which the keys are split
constexpr int kVectorRows = 4;  // of a key head, up to which no matrices are used

[[noreturn]] void fail(const char* function, const std::string& message) {
  throw std::invalid_argument(std::string("[") + function + "] " + message);
}

void check_dim(const char* function, const std::string& name, int dim) {
  if (dim < 8 || dim % 8 != 0 || dim > kMaxDim) {
    fail(function, name + "dim is " + std::to_string(dim) + "; it must be a multiple of 8 up to " +
                       std::to_string(kMaxDim));
  }
}

int type_bytes(cpu::Float type) {
  return int(cpu::size_of(type));
}

// Bytes of one token's vector.
double vector_bytes(const KvTensor& x, cpu::Float type) {
  return x.format.dense() ? double(x.dim) * type_bytes(type)
                          : 4.0 * cpu::record_words(x.dim, x.format);
}

// Simdgroups that share a tile, of 8 rows each: all rows at once, as far as the queries fit.
int sharing(const QuantizedAttention& op, int all_rows) {
  int share = all_rows <= 8 ? 1 : all_rows <= 16 ? 2 : 4;
  int size = type_bytes(op.type);
  while (share > 1 && kTileBytes + 8 * share * (op.k.dim * size + 16) > kThreadgroupMemory) {
    share /= 2;
  }
  return share;
}

// Long enough that queries, which each split reads, and its result, which is written and read
// again, stay below 4 % of the keys and values; short enough to keep the GPU busy.
int split_keys(const QuantizedAttention& op, int tile_rows, const Tuning& t) {
  if (t.kv_split > 0) {
    return t.kv_split;
  }
  int step = kSimdgroups * kTileKeys;
  int row_bytes = op.k.dim * type_bytes(op.type) + 2 * 4 * (op.v.dim + 2);
  double token_bytes = vector_bytes(op.k, op.type) + vector_bytes(op.v, op.type);
  double keys = tile_rows * row_bytes / (0.04 * token_bytes);
  return std::clamp(int(keys / step + 1) * step, 2 * step, 8 * step);
}

void check(const QuantizedAttention& op) {
  constexpr const char* function = "plan_quantized_attention";
  for (auto [name, x] : {std::pair("k.", &op.k), std::pair("v.", &op.v)}) {
    check_dim(function, name, x->dim);
    if (!x->format.dense()) {
      check_format(function, name, x->format, Holds::keys_and_values);
    }
  }
  if (op.kv_heads < 1 || op.heads < 1 || op.heads % op.kv_heads != 0) {
    fail(function, std::to_string(op.heads) + " heads are no multiple of " +
                       std::to_string(op.kv_heads) + " key heads");
  }
  if (op.batch < 0 || op.rows < 0 || op.keys < 0 || op.window < 0 || op.first < 0 ||
      op.recent < 0) {
    fail(function, "batch, rows, keys, window, first and recent must be at least 0");
  }
  if (op.window > 0 && !op.causal) {
    fail(function, "window goes with causal only");
  }
  const int full[] = {op.batch, op.heads, op.rows, op.keys};
  for (int i = 0; i < 4 && op.mask != QuantizedAttention::Mask::none; i++) {
    if (op.mask_shape[i] != 1 && op.mask_shape[i] != full[i]) {
      fail(function, "axis " + std::to_string(i) + " of the mask is " +
                         std::to_string(op.mask_shape[i]) + "; it must be 1 or " +
                         std::to_string(full[i]));
    }
  }
}

AttentionShape shape_of(const QuantizedAttention& op) {
  AttentionShape shape{};
  std::copy(op.k.strides.begin(), op.k.strides.end(), shape.k_strides);
  std::copy(op.v.strides.begin(), op.v.strides.end(), shape.v_strides);
  int64_t stride = 1;
  for (int i = 3; i >= 0; i--) {
    shape.mask_strides[i] = op.mask_shape[i] == 1 ? 0 : stride;
    stride *= op.mask_shape[i];
  }
  shape.heads = op.heads;
  shape.kv_heads = op.kv_heads;
  shape.rows = op.rows;
  shape.keys = op.keys;
  shape.causal = op.causal;
  shape.window = op.window;
  shape.mask = int(op.mask);
  shape.starts = op.starts;
  shape.sinks = op.sinks;
  shape.first = op.first;
  shape.recent = op.recent;
  shape.scale = op.scale;
  shape.softcap = op.softcap;
  return shape;
}

// The same with how the keys are split.
AttentionShape split_shape(const QuantizedAttention& op, const Tuning& t) {
  AttentionShape shape = shape_of(op);
  int group = op.heads / op.kv_heads, all_rows = group * op.rows;
  // Without matrices a row has the same bits beside any others, so the splits are those of the
  // most.
  int tile_rows = all_rows <= kVectorRows ? kVectorRows / group * group
                                          : std::min(all_rows, 8 * sharing(op, all_rows));
  int reach = op.window > 0 ? std::min(op.keys, op.window + op.rows - 1) : op.keys;
  shape.split_keys = op.rows <= kDecodeRows ? split_keys(op, tile_rows, t) : std::max(reach, 1);
  shape.splits = std::max(1, ceil_div(reach, shape.split_keys));
  return shape;
}

// What the kernel finds at buffers 3 ... 10: an input of the op where there is one, else the
// queries, which are not read there but must be bound.
std::vector<Argument> optional_inputs(const QuantizedAttention& op) {
  using Mask = QuantizedAttention::Mask;
  int next = 3;
  auto input = [&](bool there) { return Argument{Kind::input, there ? next++ : 0}; };
  std::vector<Argument> out = {input(op.mask == Mask::seen), input(op.mask == Mask::added)};
  for (bool there :
      {op.starts, op.first > 0, op.first > 0, op.recent > 0, op.recent > 0, op.sinks}) {
    out.push_back(input(there));
  }
  return out;
}

} // namespace

std::vector<std::string> kv_format(const KvTensor& x) {
  auto [bits, group_size] = x.format.dense() ? AffineFormat{16, 32} : x.format;
  return {std::to_string(bits), std::to_string(group_size)};
}

Plan plan_quantized_attention(const QuantizedAttention& op, const Tuning& t) {
  check(op);
  Plan plan;
  plan.strided = {1, 2};
  int all_rows = op.heads / op.kv_heads * op.rows;
  if (op.batch * all_rows == 0) {
    return plan;
  }
  AttentionShape shape = split_shape(op, t);
  int share = sharing(op, all_rows), tile_rows = 8 * share;
  bool split = shape.splits > 1, vector = all_rows <= kVectorRows;

  std::string type = metal_name(op.type), value_dim = std::to_string(op.v.dim);
  std::vector<std::string> arguments = {type, std::to_string(op.k.dim), value_dim};
  for (const auto* x : {&op.k, &op.v}) {
    for (const std::string& part : kv_format(*x)) {
      arguments.push_back(part);
    }
  }
  arguments.push_back(std::to_string(vector ? all_rows : share));
  if (vector) {
    bool plain = op.rows == 1 && op.mask == QuantizedAttention::Mask::none && op.softcap == 0;
    arguments.push_back(plain ? "true" : "false");
  }
  arguments.push_back(op.first > 0 || op.recent > 0 ? "true" : "false");
  arguments.push_back(split ? "true" : "false");
  std::string function = vector ? "attention_vector" : "attention";
  Launch attend = instantiate((function + ".metal").c_str(), function, arguments);
  attend.arguments = {{Kind::input, 0}, {Kind::input, 1}, {Kind::input, 2}};
  auto optional = optional_inputs(op);
  attend.arguments.insert(attend.arguments.end(), optional.begin(), optional.end());
  Argument unused{Kind::input, 0}, result{Kind::output, 0};
  attend.arguments.push_back(split ? unused : result);
  attend.arguments.push_back(split ? Argument{Kind::temporary, 0} : unused);
  attend.arguments.push_back(split ? Argument{Kind::temporary, 1} : unused);
  attend.arguments.push_back(constants(shape));
  attend.threadgroups = {uint32_t(shape.splits), uint32_t(ceil_div(all_rows, tile_rows)),
      uint32_t(op.batch * op.kv_heads)};
  attend.threads.x = 32 * kSimdgroups;
  plan.launches.push_back(attend);
  if (split) {
    size_t rows = size_t(op.batch) * op.heads * op.rows;
    plan.temporaries = {shape.splits * rows * op.v.dim * 4, shape.splits * rows * 8};
    Launch merge = instantiate("attention.metal", "attention_merge", {type, value_dim});
    merge.arguments = {
        {Kind::temporary, 0}, {Kind::temporary, 1}, optional.back(), result, constants(shape)};
    merge.threadgroups.x = uint32_t(rows);
    merge.threads.x = 32;
    plan.launches.push_back(merge);
  }
  return plan;
}

bool replan_attention(const QuantizedAttention& op, const Tuning& t, Launch* first, int launches) {
  AttentionShape shape = split_shape(op, t), before;
  Argument& told = first->arguments.back();
  std::memcpy(&before, told.bytes.data(), sizeof(before));
  if (shape.splits != before.splits) {
    return false;
  }
  for (int i = 0; i < launches; i++) {
    first[i].arguments.back() = constants(shape);
  }
  return true;
}

Plan plan_quantize_kv(const QuantizeKv& op) {
  constexpr const char* function = "plan_quantize_kv";
  constexpr size_t kThreads = 64;
  check_dim(function, "", op.dim);
  check_format(function, "", op.format, Holds::keys_and_values);
  size_t groups = op.vectors * size_t(ceil_div(op.dim, op.format.group_size));
  if (groups > 0xffffffffu - kThreads) { // counted in 32 bits by the kernel
    fail(function,
        std::to_string(op.vectors) + " vectors are too many; split them below 2^32 groups");
  }
  Plan plan;
  if (groups == 0) {
    return plan;
  }
  Launch quantize = instantiate("quantize_kv.metal", "quantize_kv",
      {metal_name(op.type), std::to_string(op.format.bits), std::to_string(op.format.group_size)});
  RecordShape shape{uint32_t(op.vectors), uint32_t(op.dim)};
  quantize.arguments = {{Kind::input, 0}, {Kind::output, 0}, constants(shape)};
  quantize.threads.x = kThreads;
  quantize.threadgroups.x = uint32_t((groups + kThreads - 1) / kThreads);
  plan.launches.push_back(quantize);
  return plan;
}

} // namespace optiq::launch
