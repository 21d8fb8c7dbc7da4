#include "launch/quantized_matmul.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "../metal/shapes.h"

namespace optiq::launch {

namespace {

constexpr int kMaxParts = 4;
constexpr int kThreadgroupMemory = 32 * 1024;

const char* metal_name(Float type) {
  switch (type) {
    case Float::f32:
      return "float";
    case Float::f16:
      return "half";
    default:
      return "bfloat";
  }
}

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// "qmv<half, 16>" -> host name "qmv_half_16".
Launch launch(const char* source, const char* function, const std::vector<std::string>& arguments) {
  Launch out;
  out.source = source;
  out.kernel = function;
  out.instantiation = std::string(function) + "<";
  for (size_t i = 0; i < arguments.size(); i++) {
    out.kernel += "_" + arguments[i];
    out.instantiation += (i ? ", " : "") + arguments[i];
  }
  out.instantiation += ">";
  return out;
}

std::string widths(const QuantizedMatmul& op) {
  int set = 0;
  for (const auto& w : op.weights) {
    set |= 1 << w.bits;
  }
  return std::to_string(set);
}

// Binds the arrays and the shape, and sets the grid's first axis: the tiles of all parts.
void finish(const QuantizedMatmul& op, int tile, Launch& out) {
  using Kind = Argument::Kind;
  int parts = int(op.weights.size());
  int slots = parts == 1 ? 1 : kMaxParts;
  out.arguments.push_back({Kind::input, 0});
  for (int p = 0; p < slots; p++) {
    for (int i = 0; i < 3; i++) { // unused slots are never read, but must be bound
      out.arguments.push_back({Kind::input, p < parts ? 1 + 3 * p + i : 0});
    }
  }
  if (op.experts > 0) {
    out.arguments.push_back({Kind::input, 1 + 3 * parts});
  }
  for (int p = 0; p < slots; p++) {
    out.arguments.push_back(p < parts ? Argument{Kind::output, p} : Argument{Kind::input, 0});
  }
  QuantizedShape shape{};
  shape.m = op.rows;
  shape.k = op.inner;
  shape.parts = parts;
  shape.experts = op.experts;
  int tiles = 0;
  for (int p = 0; p < parts; p++) {
    const auto& w = op.weights[p];
    int group_shift = w.group_size == 32 ? 5 : w.group_size == 64 ? 6 : 7;
    shape.part[p] = {w.out, w.bits, group_shift, tiles};
    tiles += ceil_div(w.out, tile);
  }
  Argument constants{Kind::constants};
  constants.bytes.resize(sizeof(shape));
  std::memcpy(constants.bytes.data(), &shape, sizeof(shape));
  out.arguments.push_back(constants);
  out.threadgroups.x = uint32_t(tiles);
}

// Rows of x a kernel is compiled for: exact where decoding is common, else at most one in vain.
int compiled_rows(int rows) {
  return rows <= 8 ? rows : (rows + 1) / 2 * 2;
}

Launch qmv(const QuantizedMatmul& op, const Tuning& t) {
  bool gather = op.experts > 0;
  int rows = gather ? 1 : compiled_rows(op.rows);
  int results = rows <= 8 ? t.results : t.results_wide;
  int row_lanes = 32 / t.k_lanes;
  int x_bytes = int(cpu::size_of(op.x));
  int staged_bytes = rows * t.k_lanes * (32 * x_bytes + 16);
  bool staged = rows >= t.stage_from && staged_bytes <= kThreadgroupMemory && !gather;
  int simdgroups = t.simdgroups;
  if (staged) { // no more than the 1024 threads a threadgroup may have
    simdgroups = std::clamp(t.staged_tile / (row_lanes * results), 1, 32);
  }
  int tile = simdgroups * row_lanes * results;

  std::vector<std::string> arguments = {metal_name(op.x), metal_name(op.scales), widths(op)};
  auto add = [&](int value) { arguments.push_back(std::to_string(value)); };
  if (!gather) {
    add(rows);
  }
  add(results);
  add(t.k_lanes);
  add(simdgroups);
  if (!gather) {
    arguments.push_back(staged ? "true" : "false");
  }
  const char* function = gather ? "qmv_gather" : op.weights.size() > 1 ? "qmv_mixed" : "qmv";
  Launch out = launch("qmv.metal", function, arguments);
  finish(op, tile, out);
  out.threadgroups.y = gather ? uint32_t(op.rows) : 1;
  out.threads.x = uint32_t(32 * simdgroups);
  return out;
}

Launch qmm(const QuantizedMatmul& op, const Tuning& t) {
  bool gather = op.experts > 0;
  int bm = op.rows > 32 && !gather ? 64 : 32;
  int bn = 64;
  int row_tiles = gather ? op.rows : ceil_div(op.rows, bm);
  int tiles = 0;
  for (const auto& w : op.weights) {
    tiles += ceil_div(w.out, bn);
  }
  if (op.transpose && int64_t(tiles) * row_tiles < t.narrow_from) {
    bn = 32;
  }
  std::vector<std::string> arguments = {
      metal_name(op.x), metal_name(op.scales), widths(op), std::to_string(bm), std::to_string(bn)};
  const char* function = gather ? "qmm_gather" : op.weights.size() > 1 ? "qmm_mixed" : "qmm";
  if (!gather && op.weights.size() == 1) {
    arguments.push_back(op.transpose ? "true" : "false");
  }
  Launch out = launch("qmm.metal", function, arguments);
  finish(op, bn, out);
  out.threadgroups.y = uint32_t(row_tiles);
  out.threads.x = 128;
  return out;
}

} // namespace

Plan plan_quantized_matmul(const QuantizedMatmul& op, const Tuning& t) {
  auto fail = [](auto&&... parts) {
    std::ostringstream msg;
    msg << "[plan_quantized_matmul] ";
    (msg << ... << parts);
    throw std::invalid_argument(msg.str());
  };
  size_t n = op.weights.size();
  if (n < 1 || n > kMaxParts) {
    fail(n, " weights share x; a launch takes 1 to ", kMaxParts);
  }
  if (n > 1 && (!op.transpose || op.experts > 0)) {
    fail("several weights go with transpose and without experts only");
  }
  for (const auto& w : op.weights) {
    if (w.bits < 2 || w.bits > 8 || w.bits == 7) {
      fail("bits is ", w.bits, "; it must be 2, 3, 4, 5, 6 or 8");
    }
    if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128) {
      fail("group_size is ", w.group_size, "; it must be 32, 64 or 128");
    }
    int grouped = op.transpose ? op.inner : w.out;
    if (grouped % w.group_size != 0) {
      fail("the weight's rows have ", grouped, " columns, no multiple of ", w.group_size);
    }
  }
  Plan plan;
  bool empty = op.rows == 0;
  for (const auto& w : op.weights) {
    empty = empty || (n == 1 && w.out == 0);
  }
  if (empty) {
    return plan;
  }
  bool few = op.experts > 0 || op.rows < t.qmm_from;
  plan.launches.push_back(op.transpose && few ? qmv(op, t) : qmm(op, t));
  return plan;
}

} // namespace optiq::launch
