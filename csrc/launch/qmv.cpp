#include "launch/qmv.h"

#include <algorithm>

#include "../metal/shapes.h"
#include "launch/instantiate.h"

namespace optiq::launch {

namespace {

constexpr int kThreadgroupMemory = 32 * 1024;
constexpr int kMaxSimdgroups = 32; // of the 1024 threads a threadgroup may have

// Rows of x a kernel is compiled for: exact where decoding is common, else at most one in vain.
int compiled_rows(int rows) {
  return rows <= 8 ? rows : (rows + 1) / 2 * 2;
}

// Results that a lane holds, so that 512 threads or more have registers on a core.
int results(int rows, const Tuning& t) {
  return rows <= 3 ? t.results : rows <= 8 ? t.results_wide : std::max(1, t.results_wide / 2);
}

int tiles_of(const QuantizedPart& part, int inner, int tile) {
  return ceil_div(part.n, tile) * std::max(1, ceil_div(inner, part.columns));
}

} // namespace

std::vector<std::string> QmvTile::arguments() const {
  std::vector<std::string> out;
  for (int value : {rows, results, k_lanes, simdgroups}) {
    out.push_back(std::to_string(value));
  }
  out.push_back(staged ? "true" : "false");
  return out;
}

QmvTile qmv_tile(int of_x, const Tuning& t, bool norm, int sums) {
  QmvTile out{compiled_rows(of_x), 0, t.k_lanes, t.simdgroups, false};
  auto staged_bytes = [&] { return out.rows * t.k_lanes * (norm ? 11 : 9) * 16; }; // staged_chunk
  if (out.rows > 8 && staged_bytes() > kThreadgroupMemory) {
    out.rows = 8; // in two tiles
  }
  // One row leaves room for the sums of several products.
  out.results = std::max(1, results(out.rows, t) / (out.rows > 1 ? sums : 1));
  out.staged = out.rows >= t.stage_from && staged_bytes() <= kThreadgroupMemory;
  if (out.staged) {
    out.simdgroups = std::clamp(t.staged_tile / (32 / t.k_lanes * out.results), 1, kMaxSimdgroups);
  }
  return out;
}

QmvTile qmv_row_tile(const Tuning& t) {
  return {1, t.results, t.k_lanes, t.simdgroups, false};
}

QuantizedShape quantized_shape(const std::vector<QuantizedWeight>& weights, int rows, int inner,
    int tile, const std::vector<int>& columns) {
  QuantizedShape shape{};
  shape.m = rows;
  shape.k = inner;
  shape.parts = int(weights.size());
  int tiles = 0;
  for (size_t p = 0; p < weights.size(); p++) {
    const auto& w = weights[p];
    int group_shift = w.format.group_size == 32 ? 5 : w.format.group_size == 64 ? 6 : 7;
    shape.part[p] = {w.out, w.format.bits, group_shift, tiles,
        columns.empty() ? std::max(inner, 1) : columns[p]};
    tiles += tiles_of(shape.part[p], inner, tile);
  }
  return shape;
}

int tiles_of(const QuantizedShape& shape, int tile) {
  const QuantizedPart& last = shape.part[shape.parts - 1];
  return last.first_tile + tiles_of(last, shape.k, tile);
}

} // namespace optiq::launch
