// Coordinate descent where the errors of rows add up: outputs that move the model in like ways.
//
// With G the second moments of the gradients at a layer's outputs, a change D = v - w of the weight
// costs tr(G D H D') (YAQA, Tseng et al. 2025, arXiv:2505.22988). With the other rows as they are,
// row i costs G_ii (D_i + c_i) H (D_i + c_i)' and what does not depend on it, with
// c_i = sum over j != i of G_ij D_j / G_ii: its error should undo what the others' do. That is the
// descent of one row (descent.h) to a target that is moved by -c_i.
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
        most((a.rows / turns + kRowsTogether) / kRowsTogether * kRowsTogether),
        change(a.rows * a.cols),
        shares(most * a.rows),
        pull(most * a.cols),
        moved(most * a.cols),
        step(most * a.cols),
        bend(most * a.cols) {
    auto start = [&](int i) {
      Tile tile(1, a.cols, by_rows.groups);
      by_rows.read(i, 0, tile);
      std::memcpy(&change[i * a.cols], &tile.error[0], sizeof(float) * a.cols);
    };
    parallel_for(int(a.rows), start);
  }

  void round() {
    for (size_t turn = 0; turn < turns; turn++) {
      const size_t n = (a.rows - turn + turns - 1) / turns;
      gather(turn, n);
      // If rows of one turn do share, careful steps cannot raise what they cost together.
      for (bool careful : {false, true}) {
        aim(turn, n, careful);
        auto tiles = take_steps(turn, n);
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

  const Descent& a;
  const RowDescent by_rows;
  const size_t turns, most; // rows of a turn, at most, filled up to whole tiles
  Scratch<float> change;    // [rows, cols], D
  // Of the rows of a turn: G [most, rows], G D, where they are to go, the change of D and that
  // times H, [most, cols].
  Scratch<float> shares, pull, moved, step, bend;

  size_t row(size_t turn, size_t i) const {
    return turn + i * turns;
  }

  void gather(size_t turn, size_t n) {
    std::memset(&shares[0], 0, sizeof(float) * most * a.rows);
    std::memset(&pull[0], 0, sizeof(float) * most * a.cols);
    for (size_t i = 0; i < n; i++) {
      std::memcpy(&shares[i * a.rows], a.outputs + row(turn, i) * a.rows, sizeof(float) * a.rows);
    }
    auto columns = [&](int part) {
      for (size_t i = 0; i < n; i += kRowsTogether) {
        add_product(&shares[i * a.rows], a.rows, a.rows, &change[0], &pull[i * a.cols], a.cols,
            part * kColumnsTogether);
      }
    };
    parallel_for(int(a.cols / kColumnsTogether), columns);
  }

  // Where each row should be: at -c_i, or a shorter step on the way.
  void aim(size_t turn, size_t n, bool careful) {
    for (size_t i = 0; i < n; i++) {
      const float* own = &shares[i * a.rows];
      float* out = &moved[i * a.cols];
      float all = 0;
      for (size_t j = 0; j < n; j++) {
        all += std::fabs(own[row(turn, j)]);
      }
      const float by = 1 / (careful ? all : own[row(turn, i)]);
      for (size_t c = 0; c < a.cols; c++) {
        out[c] = -pull[i * a.cols + c] * by;
      }
      for (size_t j = 0; j < n; j++) {
        const float share = careful ? float(i == j) : own[row(turn, j)] * by;
        const float* old = &change[row(turn, j) * a.cols];
        for (size_t c = 0; share != 0 && c < a.cols; c++) {
          out[c] += share * old[c];
        }
      }
    }
  }

  Tiles take_steps(size_t turn, size_t n) {
    Tiles tiles((n + kRowsTogether - 1) / kRowsTogether);
    auto each = [&](int task) {
      const size_t first = size_t(task) * kRowsTogether, size = kRowsTogether * a.cols;
      const int rows = int(std::min<size_t>(kRowsTogether, n - first));
      auto& tile = *(tiles[task] = std::make_unique<Tile>(kRowsTogether, a.cols, by_rows.groups));
      float *steps = &step[first * a.cols], *bends = &bend[first * a.cols];
      for (int r = 0; r < rows; r++) {
        by_rows.read(row(turn, first + r), r, tile);
      }
      for (size_t i = 0; i < rows * a.cols; i++) {
        tile.error[i] -= moved[first * a.cols + i];
      }
      by_rows.start_slope(tile, rows);
      std::memcpy(steps, &tile.error[0], sizeof(float) * size);
      std::memcpy(bends, &tile.slope[0], sizeof(float) * size);
      by_rows.sweep(tile, rows);
      for (size_t i = 0; i < size; i++) {
        steps[i] = tile.error[i] - steps[i];
        bends[i] = tile.slope[i] - bends[i];
      }
    };
    parallel_for(int(tiles.size()), each);
    return tiles;
  }

  // tr(G D H D') after these steps, over that before: sum (G_own step + 2 pull) * (step H).
  double cost(size_t turn, size_t n) const {
    double total = 0;
    for (size_t i = 0; i < n; i++) {
      for (size_t c = 0; c < a.cols; c += kWide) {
        fw by = 2 * load<fw>(&pull[i * a.cols + c]);
        for (size_t j = 0; j < n; j++) {
          by += shares[i * a.rows + row(turn, j)] * load<fw>(&step[j * a.cols + c]);
        }
        total += sum(by * load<fw>(&bend[i * a.cols + c]));
      }
    }
    return total;
  }

  void keep(size_t turn, size_t n, const Tiles& tiles) {
    for (size_t i = 0; i < n; i++) {
      by_rows.write(row(turn, i), int(i % kRowsTogether), *tiles[i / kRowsTogether]);
      for (size_t c = 0; c < a.cols; c++) {
        change[row(turn, i) * a.cols + c] += step[i * a.cols + c];
      }
    }
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
