// Coordinate descent where the errors of rows add up: outputs that move the model in like ways.
//
// With G the second moments of the gradients at a layer's outputs, a change D = v - w of the weight
// costs tr(G D H D') (YAQA, Tseng et al. 2025, arXiv:2505.22988). With the other rows as they are,
// row i costs G_ii (D_i + c_i) H (D_i + c_i)' and what does not depend on it, with
// c_i = sum over j != i of G_ij D_j / G_ii: its error should undo what the others' do. That is the
// descent of one row (descent.h) to a target that is moved by -c_i. Only slopes are needed for it,
// and what steps do to them is kept up to date, so that H is read once in a round: a wide H does
// not fit a cache.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "descent.h"

namespace optiq::cpu::OPTIQ_ISA {

class TogetherDescent {
 public:
  explicit TogetherDescent(const Descent& a)
      : a(a),
        by_rows(a),
        turns(a.rows < kAtOnce ? 1 : a.rows / kAtOnce),
        most(whole_tiles(a.rows / turns + 1)),
        slope(a.rows * a.cols),
        pull(whole_tiles(a.rows) * a.cols),
        shares(whole_tiles(a.rows) * most),
        step(most * a.cols),
        bend(most * a.cols) {
    std::memset(&pull[0], 0, sizeof(float) * whole_tiles(a.rows) * a.cols);
    std::memset(&shares[0], 0, sizeof(float) * whole_tiles(a.rows) * most);
    for_tiles(by_rows, [&](size_t first, int rows, const Tile& tile) {
      std::memcpy(&slope[first * a.cols], &tile.reach[0], sizeof(float) * rows * a.cols);
    });
    for (size_t turn = 0; turn < turns; turn++) { // as if all had just changed
      const size_t n = gather(turn);
      for (size_t i = 0; i < n; i++) {
        std::memcpy(&bend[i * a.cols], &slope[row(turn, i) * a.cols], sizeof(float) * a.cols);
      }
      spread(n);
    }
  }

  void round() {
    for (size_t turn = 0; turn < turns; turn++) {
      const size_t n = gather(turn);
      // If rows of one turn do share, careful steps cannot raise what they cost together.
      for (bool careful : {false, true}) {
        auto tiles = take_steps(turn, n, careful);
        if (cost(turn, n) < 0) {
          keep(turn, n, tiles);
          break;
        }
      }
    }
  }

 private:
  using Tile = RowDescent::Tile;
  using Tiles = std::vector<std::unique_ptr<Tile>>;

  // Rows that move at a time, each as if the others stayed: far apart, since neighbours share most.
  static constexpr size_t kAtOnce = 16;
  // Of an H that is too large for the cache of a core.
  static constexpr size_t kWideColumns = 2048;

  const Descent& a;
  const RowDescent by_rows;
  const size_t turns, most;   // rows of a turn, at most, filled up to whole tiles
  Scratch<float> slope, pull; // [rows, cols], D H and G D H
  // Of the rows of a turn: G [rows, most], the change of D and that times H, [most, cols].
  Scratch<float> shares, step, bend;

  static size_t whole_tiles(size_t rows) {
    return (rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  }

  size_t row(size_t turn, size_t i) const {
    return turn + i * turns;
  }

  // How many rows the turn has.
  size_t gather(size_t turn) {
    const size_t n = (a.rows - turn + turns - 1) / turns;
    for (size_t i = 0; i < a.rows; i++) {
      for (size_t j = 0; j < n; j++) {
        shares[i * most + j] = a.outputs[i * a.rows + row(turn, j)];
      }
    }
    return n;
  }

  // Where the rows of a turn change, all are pulled.
  void spread(size_t n) {
    auto pulled = [&](int part) {
      const size_t i = size_t(part) * kRowsTogether;
      for (size_t c = 0; c < a.cols; c += kColumnsTogether) {
        add_product(&shares[i * most], most, n, &bend[c], a.cols, &pull[i * a.cols + c], a.cols);
      }
    };
    parallel_for(int((a.rows + kRowsTogether - 1) / kRowsTogether), pulled);
  }

  // The slope of row i where its descent starts: to its target, or a shorter step on the way.
  void aim(size_t turn, size_t n, size_t i, bool careful, float* out) const {
    const float* own = &shares[row(turn, i) * most];
    float all = 0;
    for (size_t j = 0; j < n; j++) {
      all += std::fabs(own[j]);
    }
    const float by = 1 / (careful ? all : own[i]);
    for (size_t c = 0; c < a.cols; c++) {
      out[c] = pull[row(turn, i) * a.cols + c] * by;
    }
    for (size_t j = 0; j < n && !careful; j++) {
      const float share = j == i ? 0 : own[j] * by;
      const float* other = &slope[row(turn, j) * a.cols];
      for (size_t c = 0; share != 0 && c < a.cols; c++) {
        out[c] -= share * other[c];
      }
    }
  }

  // The rows of a turn for each thread, or of a wide H, which all read once together, all of them.
  size_t tile_of_a_turn(size_t n) const {
    return a.cols < kWideColumns ? kRowsTogether : whole_tiles(n);
  }

  Tiles take_steps(size_t turn, size_t n, bool careful) {
    const size_t of_tile = tile_of_a_turn(n);
    Tiles tiles((n + of_tile - 1) / of_tile);
    auto each = [&](int task) {
      const size_t first = size_t(task) * of_tile, size = of_tile * a.cols;
      const int rows = int(std::min<size_t>(of_tile, n - first));
      auto& tile = *(tiles[task] = std::make_unique<Tile>(of_tile, by_rows));
      for (int r = 0; r < rows; r++) {
        by_rows.read(row(turn, first + r), r, tile);
        aim(turn, n, first + r, careful, &tile.reach[r * a.cols]);
      }
      std::memset(&tile.error[0], 0, sizeof(float) * size); // of which the changes are kept
      float* bends = &bend[first * a.cols];
      std::memcpy(bends, &tile.reach[0], sizeof(float) * size);
      by_rows.sweep(tile, rows);
      std::memcpy(&step[first * a.cols], &tile.error[0], sizeof(float) * size);
      for (size_t i = 0; i < size; i++) {
        bends[i] = tile.reach[i] - bends[i];
      }
    };
    parallel_for(int(tiles.size()), each);
    return tiles;
  }

  // tr(G D H D') after these steps, over that before: sum (G_own step + 2 G D) H step'.
  double cost(size_t turn, size_t n) const {
    double total = 0;
    for (size_t i = 0; i < n; i++) {
      const float* own = &shares[row(turn, i) * most];
      for (size_t c = 0; c < a.cols; c += kWide) {
        fw by{};
        for (size_t j = 0; j < n; j++) {
          by += own[j] * load<fw>(&step[j * a.cols + c]);
        }
        total +=
            sum(by * load<fw>(&bend[i * a.cols + c]) +
                2 * load<fw>(&pull[row(turn, i) * a.cols + c]) * load<fw>(&step[i * a.cols + c]));
      }
    }
    return total;
  }

  void keep(size_t turn, size_t n, const Tiles& tiles) {
    const size_t of_tile = tile_of_a_turn(n);
    for (size_t i = 0; i < n; i++) {
      by_rows.write(row(turn, i), int(i % of_tile), *tiles[i / of_tile]);
      for (size_t c = 0; c < a.cols; c++) {
        slope[row(turn, i) * a.cols + c] += bend[i * a.cols + c];
      }
    }
    spread(n);
  }
};

inline void descend(const Descent& a) {
  if (!a.outputs) {
    descend_rows(a);
    return;
  }
  TogetherDescent descent(a);
  for (int sweep = 0; sweep < a.sweeps; sweep++) {
    descent.round();
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
