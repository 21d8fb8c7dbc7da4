#include "launch/quantized_matmul.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "../metal/shapes.h"
#include "cpu/affine_format.h"
#include "launch/instantiate.h"
#include "launch/qmv.h"

namespace optiq::launch {

namespace {

constexpr size_t kMaxParts = 4; // slots of qmv_mixed and qmm_mixed

// What one launch does: some of the weights, all with one type of scales.
struct Batch {
  const QuantizedMatmul& op;
  std::vector<int> weights;

  const QuantizedWeight& operator[](size_t i) const {
    return op.weights[weights[i]];
  }
  size_t size() const {
    return weights.size();
  }
  std::vector<QuantizedWeight> chosen() const {
    std::vector<QuantizedWeight> out;
    for (int i : weights) {
      out.push_back(op.weights[i]);
    }
    return out;
  }
  int tiles(int tile) const {
    return tiles_of(chosen(), tile);
  }
  // X, S and WIDTHS of the kernels.
  std::vector<std::string> types() const {
    int widths = 0;
    for (size_t i = 0; i < size(); i++) {
      widths |= 1 << (*this)[i].format.bits;
    }
    return {metal_name(op.x), metal_name((*this)[0].scales), std::to_string(widths)};
  }
};

// Binds the arrays and the shape, and sets the grid's first axis: the tiles of all parts.
void finish(const Batch& batch, int tile, Launch& out) {
  using Kind = Argument::Kind;
  const QuantizedMatmul& op = batch.op;
  size_t slots = batch.size() == 1 ? 1 : kMaxParts;
  out.arguments.push_back({Kind::input, 0});
  for (size_t p = 0; p < slots; p++) {
    for (int i = 0; i < 3; i++) { // unused slots are never read, but must be bound
      out.arguments.push_back({Kind::input, p < batch.size() ? 1 + 3 * batch.weights[p] + i : 0});
    }
  }
  if (op.experts > 0) {
    out.arguments.push_back({Kind::input, int(1 + 3 * op.weights.size())});
  }
  for (size_t p = 0; p < slots; p++) {
    out.arguments.push_back(
        p < batch.size() ? Argument{Kind::output, batch.weights[p]} : Argument{Kind::input, 0});
  }
  QuantizedShape shape = quantized_shape(batch.chosen(), op.rows, op.inner, tile);
  shape.experts = op.experts;
  out.arguments.push_back(constants(shape));
  out.threadgroups.x = uint32_t(batch.tiles(tile));
}

Launch qmv(const Batch& batch, const Tuning& t) {
  const QuantizedMatmul& op = batch.op;
  bool gather = op.experts > 0;
  QmvTile tile = gather ? qmv_row_tile(t) : qmv_tile(op.rows, t);
  auto arguments = batch.types();
  auto of_tile = tile.arguments();
  if (gather) { // always one row, and not staged
    of_tile = {of_tile.begin() + 1, of_tile.end() - 1};
  }
  arguments.insert(arguments.end(), of_tile.begin(), of_tile.end());
  const char* function = gather ? "qmv_gather" : batch.size() > 1 ? "qmv_mixed" : "qmv";
  Launch out = instantiate("qmv.metal", function, arguments);
  finish(batch, tile.outputs(), out);
  out.threadgroups.y = uint32_t(ceil_div(op.rows, tile.rows));
  out.threads.x = uint32_t(32 * tile.simdgroups);
  return out;
}

Launch qmm(const Batch& batch, const Tuning& t) {
  const QuantizedMatmul& op = batch.op;
  bool gather = op.experts > 0;
  int bm = op.rows > 32 && !gather ? 64 : 32;
  int bn = 64;
  int row_tiles = gather ? op.rows : ceil_div(op.rows, bm);
  if (op.transpose && int64_t(batch.tiles(bn)) * row_tiles < t.narrow_from) {
    bn = 32;
  }
  auto arguments = batch.types();
  arguments.push_back(std::to_string(bm));
  arguments.push_back(std::to_string(bn));
  const char* function = gather ? "qmm_gather" : batch.size() > 1 ? "qmm_mixed" : "qmm";
  if (!gather && batch.size() == 1) {
    arguments.push_back(op.transpose ? "true" : "false");
  }
  Launch out = instantiate("qmm.metal", function, arguments);
  finish(batch, bn, out);
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
  if (op.weights.empty()) {
    fail("no weight");
  }
  if (op.weights.size() > 1 && (!op.transpose || op.experts > 0)) {
    fail("several weights go with transpose and without experts only");
  }
  std::vector<Batch> batches;
  for (size_t i = 0; i < op.weights.size(); i++) {
    const auto& w = op.weights[i];
    check_format("plan_quantized_matmul", "", w.format);
    int grouped = op.transpose ? op.inner : w.out;
    if (grouped % w.format.group_size != 0) {
      fail("the weight's rows have ", grouped, " columns, no multiple of ", w.format.group_size);
    }
    if (op.rows == 0 || w.out == 0) {
      continue; // an empty output
    }
    auto fits = [&](const Batch& b) { return b.size() < kMaxParts && b[0].scales == w.scales; };
    auto batch = std::find_if(batches.begin(), batches.end(), fits);
    if (batch == batches.end()) {
      batches.push_back({op, {}});
      batch = batches.end() - 1;
    }
    batch->weights.push_back(int(i));
  }
  Plan plan;
  bool few = op.experts > 0 || op.rows < t.qmm_from;
  for (const Batch& batch : batches) {
    plan.launches.push_back(op.transpose && few ? qmv(batch, t) : qmm(batch, t));
  }
  return plan;
}

} // namespace optiq::launch
