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

constexpr size_t kMaxParts = 4;    // slots of qmv_mixed and qmm_mixed
constexpr int kDepth = 32;         // as in metal/qmm.h: columns that are decoded at a time
constexpr int kLeastColumns = 256; // of a split
constexpr int kMergeTile = 256;    // outputs of a threadgroup of qmm_merge
constexpr int kFirstRows = 128;    // threads of expert_rows

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
  std::vector<Argument> outputs() const {
    std::vector<Argument> out;
    for (int i : weights) {
      out.push_back({Argument::Kind::output, i});
    }
    return out;
  }
  QuantizedShape shape(int tile, const std::vector<int>& columns = {}) const {
    QuantizedShape out = quantized_shape(chosen(), op.rows, op.inner, tile, columns);
    out.experts = op.experts;
    return out;
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

// An argument for each slot; those that are not used are never touched, but must be bound.
void bind_slots(const std::vector<Argument>& arguments, size_t slots, Launch& out) {
  for (size_t p = 0; p < slots; p++) {
    out.arguments.push_back(
        p < arguments.size() ? arguments[p] : Argument{Argument::Kind::input, 0});
  }
}

// Binds the arrays and the shape, and sets the grid's first axis: the tiles of all parts. `results`
// are the outputs of the parts, or their sums.
void finish(const Batch& batch, const QuantizedShape& shape, int tile,
    const std::vector<Argument>& results, Launch& out) {
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
  bind_slots(results, slots, out);
  out.arguments.push_back(constants(shape));
  out.threadgroups.x = uint32_t(tiles_of(shape, tile));
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
  finish(batch, batch.shape(tile.outputs()), tile.outputs(), batch.outputs(), out);
  out.threadgroups.y = uint32_t(ceil_div(op.rows, tile.rows));
  out.threads.x = uint32_t(32 * tile.simdgroups);
  return out;
}

// Columns of x whose products a threadgroup adds up: fewer than all where a weight alone gives the
// GPU too few threadgroups. What is beside it in a launch must not change its bits.
int columns_of_split(
    const QuantizedMatmul& op, const QuantizedWeight& w, int row_tiles, const Tuning& t) {
  int alone = ceil_div(w.out, 32) * row_tiles;
  int splits = std::min(ceil_div(t.narrow_from, alone), op.inner / kLeastColumns);
  return splits > 1 ? ceil_div(ceil_div(op.inner, kDepth), splits) * kDepth : std::max(op.inner, 1);
}

void qmm(const Batch& batch, const Tuning& t, Plan& plan) {
  const QuantizedMatmul& op = batch.op;
  bool gather = op.experts > 0, split = false;
  int bm = op.rows > 32 && !gather ? 64 : 32;
  int bn = 64;
  int row_tiles = gather ? op.rows : ceil_div(op.rows, bm);
  std::vector<int> columns;
  if (op.transpose) {
    if (int64_t(tiles_of(batch.shape(bn), bn)) * row_tiles < t.narrow_from) {
      bn = 32;
    }
    for (const auto& w : batch.chosen()) {
      columns.push_back(columns_of_split(op, w, row_tiles, t));
      split |= columns.back() < op.inner;
    }
  }
  QuantizedShape shape = batch.shape(bn, columns);
  std::vector<Argument> sums;
  for (size_t p = 0; split && p < batch.size(); p++) {
    sums.push_back({Argument::Kind::temporary, int(plan.temporaries.size())});
    plan.temporaries.push_back(
        size_t(4) * ceil_div(op.inner, columns[p]) * op.rows * shape.part[p].n);
  }

  auto arguments = batch.types();
  arguments.push_back(std::to_string(bm));
  arguments.push_back(std::to_string(bn));
  const char* function = gather ? "qmm_gather" : batch.size() > 1 ? "qmm_mixed" : "qmm";
  if (!gather && batch.size() == 1) {
    arguments.push_back(op.transpose ? "true" : "false");
  }
  if (!gather) {
    arguments.push_back(split ? "true" : "false");
  }
  Launch out = instantiate("qmm.metal", function, arguments);
  finish(batch, shape, bn, split ? sums : batch.outputs(), out);
  out.threadgroups.y = uint32_t(row_tiles);
  out.threads.x = 128;
  plan.launches.push_back(out);
  if (split) {
    QuantizedShape whole = batch.shape(kMergeTile);
    Launch merge =
        instantiate("qmm.metal", "qmm_merge", {metal_name(op.x), metal_name(batch[0].scales)});
    merge.threadgroups = {uint32_t(tiles_of(whole, kMergeTile)), uint32_t(op.rows)};
    for (size_t p = 0; p < batch.size(); p++) {
      whole.part[p].columns = columns[p]; // of the sums; a tile has all splits
    }
    bind_slots(sums, kMaxParts, merge);
    bind_slots(batch.outputs(), kMaxParts, merge);
    merge.arguments.push_back(constants(whole));
    merge.threads.x = kMergeTile;
    plan.launches.push_back(merge);
  }
}

// Experts whose rows lie together: each has tiles of its own, so that a tile decodes one weight.
void qmm_experts(const Batch& batch, Plan& plan) {
  const QuantizedMatmul& op = batch.op;
  int each = ceil_div(op.rows, op.experts); // rows of an expert, on average
  int bm = each <= 16 ? 16 : each <= 32 ? 32 : 64, bn = 64;
  int groups = op.experts + 1; // the last: rows that name no expert
  Argument first{Argument::Kind::temporary, int(plan.temporaries.size())};
  plan.temporaries.push_back(sizeof(int) * (groups + 1));
  QuantizedShape shape = batch.shape(bn);
  Launch rows = instantiate("qmm.metal", "expert_rows", {"uint"});
  rows.arguments = {{Argument::Kind::input, 4}, first, constants(shape)};
  rows.threadgroups.x = uint32_t(ceil_div(groups + 1, kFirstRows));
  rows.threads.x = kFirstRows;
  plan.launches.push_back(rows);

  auto arguments = batch.types();
  arguments.push_back(std::to_string(bm));
  arguments.push_back(std::to_string(bn));
  Launch out = instantiate("qmm.metal", "qmm_experts", arguments);
  for (int i = 0; i < 4; i++) {
    out.arguments.push_back({Argument::Kind::input, i});
  }
  out.arguments.insert(out.arguments.end(), {first, batch.outputs()[0], constants(shape)});
  // As many tiles as there are if every group that has rows ends with a tile of one row.
  int64_t most = op.rows + int64_t(std::min(groups, op.rows)) * (bm - 1);
  out.threadgroups = {uint32_t(tiles_of(shape, bn)), uint32_t(most / bm)};
  out.threads.x = 128;
  plan.launches.push_back(out);
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
  bool many = op.rows >= t.qmm_from, together = op.sorted && op.experts > 0 && op.transpose && many;
  for (const Batch& batch : batches) {
    if (together) {
      qmm_experts(batch, plan);
    } else if (op.transpose && (op.experts > 0 || !many)) {
      plan.launches.push_back(qmv(batch, t));
    } else {
      qmm(batch, t, plan);
    }
  }
  return plan;
}

} // namespace optiq::launch
