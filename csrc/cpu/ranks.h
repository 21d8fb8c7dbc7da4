// Processes that share a model, each with a part of every layer: where they put together what they
// have.
#pragma once

#include <cstddef>
#include <vector>

#include "types.h"

namespace optiq::cpu {

// All ranks make the same calls in the same order. Parts of more than two go through rank 0, which
// adds them up in the order of the ranks, so that all have the same bits. Both calls throw
// std::runtime_error where a connection has ended.
class OPTIQ_API Ranks {
 public:
  // The connections of rank 0 are those to each other rank, in their order; another rank has one,
  // to rank 0. They are duplicated, so whoever gave them may close them.
  Ranks(int rank, int size, const std::vector<int>& connections);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int size() const {
    return size_;
  }
  // x[n] becomes the sum over the ranks.
  void total(float* x, size_t n) const;
  // y[rows, size * width]: x[rows, width] of all ranks, row by row.
  void side_by_side(const float* x, size_t rows, size_t width, float* y) const;

 private:
  int rank_, size_;
  std::vector<int> connections_;
};

} // namespace optiq::cpu
