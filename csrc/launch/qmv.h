// How a product of few rows of x is cut into tiles (metal/qmv.h).
#pragma once

#include <string>
#include <vector>

#include "launch/quantized_matmul.h"

struct QuantizedShape;

namespace optiq::launch {

constexpr int kQmvRows = 16; // of x, at most

struct QmvTile {
  int rows;    // of x, of a kernel
  int results; // of the weight, of a lane
  int k_lanes;
  int simdgroups;
  bool staged;

  int outputs() const { // of a threadgroup
    return simdgroups * (32 / k_lanes) * results;
  }
  // The last template arguments of a kernel.
  std::vector<std::string> arguments() const;
};

// `norm`: x is to be normalized. `sums`: how many products a lane holds at a time.
QmvTile qmv_tile(int rows, const Tuning& tuning, bool norm = false, int sums = 1);

// One row of x for each threadgroup, which is not staged: experts.
QmvTile qmv_row_tile(const Tuning& tuning);

// What the kernels are told of weights whose tiles lie one after another in a grid. `columns` of x
// are those of a split of each weight's sums, all of them unless given.
QuantizedShape quantized_shape(const std::vector<QuantizedWeight>& weights, int rows, int inner,
    int tile, const std::vector<int>& columns = {});

// How many tiles these are.
int tiles_of(const QuantizedShape& shape, int tile);

} // namespace optiq::launch
