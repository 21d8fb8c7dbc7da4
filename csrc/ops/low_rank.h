// Low-rank terms of the linear layers of a model, for rows that each have their own adapter.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

#include "cpu/block.h"

namespace optiq {

namespace mx = mlx::core;

/** The terms of one layer by slot; slot 0 is none. What was taken from it stays as it was. */
class LowRankTerms {
 public:
  struct Table {
    std::vector<cpu::LowRank> terms;
    std::vector<mx::array> kept; // what the terms point into
  };

  /** Throws std::invalid_argument for sizes that are not positive. */
  LowRankTerms(int slots, int in, int out);

  /** Puts x @ a @ b into a slot: evaluated, contiguous arrays [in, rank] and [rank, out], both
   * float32 or float16, with a rank that is a multiple of 8. The layer's own product is multiplied
   * with `gain`, [out] in float32, before. Throws std::invalid_argument. */
  void put(int slot, const mx::array& a, const mx::array& b,
      const std::optional<mx::array>& gain = std::nullopt);
  void clear(int slot);

  std::shared_ptr<const Table> table() const {
    return table_;
  }
  int in, out;

 private:
  std::shared_ptr<Table> changed(int slot);

  std::shared_ptr<const Table> table_;
};

using TermsPtr = std::shared_ptr<LowRankTerms>;

/** The terms that the rows of one step have beside the layers of a block. */
class TermsOfRows {
 public:
  TermsOfRows() = default;
  /** `slots` of each batch entry, of `rows` rows; null where a layer has no terms. Throws
   * std::invalid_argument for a slot that is not there. */
  TermsOfRows(const std::vector<TermsPtr>& layers, const std::vector<int>& slots, int rows);

  cpu::Adapters get() const {
    return slots_.empty() ? cpu::Adapters{} : cpu::Adapters{slots_.data(), terms_.data()};
  }

 private:
  std::vector<int> slots_;
  std::vector<const cpu::LowRank*> terms_;
  std::vector<std::shared_ptr<const LowRankTerms::Table>> tables_;
};

/** x[i] @ a @ b with the term in slots[i * slots.size() / rows], for x [rows, in] in float32. */
mx::array gathered_low_rank(const mx::array& x, const LowRankTerms& terms,
    const std::vector<int>& slots, mx::StreamOrDevice s = {});

/** The same with terms that are stacked, [slots, in, rank] and [slots, rank, out], both float32 or
 * both float16, and the slot of each row in uint32: for a GPU. A slot that is not there gives NaN.
 */
mx::array gathered_low_rank(const mx::array& x, const mx::array& a, const mx::array& b,
    const mx::array& slots, mx::StreamOrDevice s = {});

/** to[i, j] = factor * from[i, j] in float16, with rows of `to` that are `stride` apart. NumPy's
 * own conversion takes ten times as long. */
void to_half(
    const float* from, float factor, size_t rows, size_t cols, uint16_t* to, size_t stride);

/** Asks the system to keep an evaluated array in large pages: terms are read so fast that looking
 * up small ones takes a third of the time. Where it cannot, nothing happens. */
void use_large_pages(const mx::array& a);

} // namespace optiq
