// H, the second moments of a layer's inputs, as a descent reads it.
//
// It is given whole, or as samples' samples + diag(d). Of few samples that is much less to read and
// to multiply: what a change of the weight does to their outputs, the reach, is added up instead of
// what it does to the slope of every column, and the slope of a group is made of it when its turn
// comes.
#pragma once

#include <algorithm>

#include "decode.h"
#include "pool.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kRowsTogether = 8; // of `add_product`
constexpr size_t kColumnsTogether = 2 * kWide;
constexpr size_t kColumnsOfTask = 128;

// y[8, kColumnsTogether] += x[8, depth] @ m[depth, kColumnsTogether]; the columns after those are
// read next, and are too far apart for the processor to see that by itself.
inline void add_product(
    const float* x, size_t ldx, size_t depth, const float* m, size_t ldm, float* y, size_t ldy) {
  fw low[kRowsTogether], high[kRowsTogether];
  for (int i = 0; i < kRowsTogether; i++) {
    low[i] = load<fw>(y + i * ldy);
    high[i] = load<fw>(y + i * ldy + kWide);
  }
  for (size_t j = 0; j < depth; j++) {
    fw m_low = load<fw>(m + j * ldm), m_high = load<fw>(m + j * ldm + kWide);
    __builtin_prefetch(m + j * ldm + 2 * kColumnsTogether);
    __builtin_prefetch(m + j * ldm + 2 * kColumnsTogether + kWide);
    for (int i = 0; i < kRowsTogether; i++) {
      low[i] += x[i * ldx + j] * m_low;
      high[i] += x[i * ldx + j] * m_high;
    }
  }
  for (int i = 0; i < kRowsTogether; i++) {
    store(y + i * ldy, low[i]);
    store(y + i * ldy + kWide, high[i]);
  }
}

class Hessian {
 public:
  const size_t group, width; // columns of a group, and of a row of the reach

  explicit Hessian(const Descent& a)
      : group(a.format.group_size),
        width(a.samples ? (a.sampled + kColumnsTogether - 1) / kColumnsTogether * kColumnsTogether
                        : a.cols),
        a(a),
        blocks_(a.cols * group),
        ones_(a.cols),
        inputs_(a.samples ? a.cols * a.sampled : 0),
        columns_(a.samples ? a.cols * width : 0) {
    auto read = [&](int k) {
      if (a.samples) {
        pack(k);
      }
      read_block(k);
    };
    parallel_for(int(a.cols / group), read);
  }

  // H of group k, [group, group].
  const float* block(size_t k) const {
    return &blocks_[k * group * group];
  }

  // The sums of its rows.
  const float* ones(size_t k) const {
    return &ones_[k * group];
  }

  // reach += change @ H, or @ samples', over the columns of group k, of so many rows and those up
  // to the next 8th. All threads work on it, unless each has rows of its own.
  void spread(const float* change, size_t k, float* reach, int rows) const {
    const float* m = a.samples ? &columns_[k * group * width] : a.hessian + k * group * width;
    auto columns = [&](int part) {
      const size_t begin = part * kColumnsOfTask, end = std::min(width, begin + kColumnsOfTask);
      for (size_t c = begin; c < end; c += kColumnsTogether) {
        for (int r = 0; r < rows; r += kRowsTogether) {
          add_product(
              change + r * kMaxGroup, kMaxGroup, group, m + c, width, reach + r * width + c, width);
        }
      }
    };
    parallel_for(int((width + kColumnsOfTask - 1) / kColumnsOfTask), columns);
  }

  // The slope (v - w) H at the columns of group k, of as many rows; `error` is v - w [rows, cols].
  void slope(const float* reach, const float* error, size_t k, float* out, int rows) const {
    for (int r = 0; r < rows; r++) {
      const float *own = error + r * a.cols + k * group, *d = a.hessian + k * group;
      const float* whole = reach + r * width + k * group;
      for (size_t j = 0; j < group; j++) {
        out[r * kMaxGroup + j] = a.samples ? own[j] * d[j] : whole[j];
      }
    }
    // Groups are multiples of 32.
    for (size_t c = 0; a.samples && c < group; c += kColumnsTogether) {
      for (int r = 0; r < rows; r += kRowsTogether) {
        add_product(reach + r * width, width, a.sampled, &inputs_[k * group * a.sampled + c], group,
            out + r * kMaxGroup + c, kMaxGroup);
      }
    }
  }

 private:
  const Descent& a;
  Scratch<float> blocks_, ones_;
  // The samples by group, [sampled, group] and [group, width].
  Scratch<float> inputs_, columns_;

  void pack(size_t k) {
    float *in = &inputs_[k * group * a.sampled], *columns = &columns_[k * group * width];
    std::memset(columns, 0, sizeof(float) * group * width);
    for (size_t n = 0; n < a.sampled; n++) {
      const float* sample = a.samples + n * a.cols + k * group;
      std::memcpy(in + n * group, sample, sizeof(float) * group);
      for (size_t j = 0; j < group; j++) {
        columns[j * width + n] = sample[j];
      }
    }
  }

  void read_block(size_t k) {
    float* block = &blocks_[k * group * group];
    for (size_t i = 0; i < group; i++) {
      if (a.samples) {
        std::memset(block + i * group, 0, sizeof(float) * group);
        block[i * group + i] = a.hessian[k * group + i];
      } else {
        std::memcpy(block + i * group, a.hessian + (k * group + i) * a.cols + k * group,
            sizeof(float) * group);
      }
    }
    for (size_t c = 0; a.samples && c < group; c += kColumnsTogether) {
      for (size_t i = 0; i < group; i += kRowsTogether) {
        add_product(&columns_[(k * group + i) * width], width, a.sampled,
            &inputs_[k * group * a.sampled + c], group, block + i * group + c, group);
      }
    }
    for (size_t i = 0; i < group; i++) {
      f32x8 total{};
      for (size_t j = 0; j < group; j += 8) {
        total += load<f32x8>(block + i * group + j);
      }
      ones_[k * group + i] = sum(total);
    }
  }
};

} // namespace optiq::cpu::OPTIQ_ISA
