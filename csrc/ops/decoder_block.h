// The weights of a decoder block, checked and kept. They are no inputs of the graph, so that a
// block costs one node of it.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "cpu/block.h"
#include "ops/fail.h"
#include "ops/key_values.h"
#include "ops/low_rank.h"
#include "ops/matmul.h"
#include "ops/ranks.h"
#include "ops/tiled_weight.h"

namespace optiq {

template <class... Parts>
[[noreturn]] void fail_block(Parts&&... parts) {
  fail("decoder_block", parts...);
}

[[noreturn]] inline void fail_on_gpu() {
  throw std::runtime_error("[decoder_block] has no GPU kernel; run the block's layers there");
}

/** The caches that steps give which are scheduled and not yet over. MLX holds them until then. */
class Given {
 public:
  using Caches = std::vector<const array::Data*>;

  void add(const Caches& caches) {
    std::lock_guard lock(mutex_);
    caches_.insert(caches.begin(), caches.end());
  }
  void remove(const Caches& caches) {
    std::lock_guard lock(mutex_);
    for (const auto* cache : caches) {
      caches_.erase(cache);
    }
  }
  /** Whether such a step gave it, and beside MLX one array holds it. The lock keeps the step from
   * ending while references are counted. */
  bool to_one(const std::shared_ptr<array::Data>& cache) const {
    std::lock_guard lock(mutex_);
    return caches_.count(cache.get()) && cache.use_count() == 2;
  }

 private:
  mutable std::mutex mutex_;
  std::set<const array::Data*> caches_;
};

class DecoderBlock {
 public:
  /** `exact`: its products are as exact as of floats, else they read x in 16 bits (cpu/fixed.h).
   * `ranks` have its other heads and rows of the MLP. */
  DecoderBlock(bool exact, RanksPtr ranks) : exact_(exact), ranks_(std::move(ranks)) {}

  // (w, scales, biases, group size, bits, bias, tiles): dense without scales. Of a tiled weight
  // only the tiles are read and kept.
  using Matrix = std::tuple<array, std::optional<array>, std::optional<array>, int, int,
      std::optional<array>, std::optional<TiledHandle>>;
  using Norm = std::optional<std::tuple<std::optional<array>, float>>; // (weight, eps)
  using Rope = std::tuple<int, bool, std::vector<double>, double>;     // dims, traditional, ...

  /** Throws std::invalid_argument where shapes, dtypes or formats do not belong together. */
  void set_attention(const std::vector<Matrix>& qkv, const Matrix& out, int heads, int kv_heads,
      float scale, const Norm& in, const Norm& q, const Norm& k, const Norm& v, const Norm& post,
      bool whole_norm, const std::optional<Rope>& rope, const std::optional<array>& sinks,
      float softcap, float gain);
  void set_mlp(const std::vector<Matrix>& gate_up, const Matrix& down,
      const std::string& activation, const Norm& in, const Norm& post, float gain);

  /** Low-rank terms beside its projections, in this order: queries, keys, values, output, gate, up,
   * down; one for matrices in one. Null where there are none. */
  void set_terms(const std::vector<TermsPtr>& terms);

  /** Those of the rows of a step, of which each batch entry has a slot. Without slots none. */
  TermsOfRows terms(const std::vector<int>& slots, int batch, int rows) const;

  /** Throws std::invalid_argument unless h is its input [batch, rows, width], in float32, and it
   * has attention and, if `with_mlp`, an MLP. */
  const cpu::AttentionLayer& attention_over(const array& h, bool with_mlp = false) const;
  const cpu::AttentionLayer& attention_over(const mx::Shape& h, bool with_mlp) const;
  AttentionShape shape(int batch, int rows) const;

  std::optional<cpu::AttentionLayer> attention;
  std::optional<cpu::MlpLayer> mlp;
  Given given;

 private:
  const void* keep(const array& a);
  const float* vector(const char* name, const array& a, int size);
  cpu::Projection projection(const char* name, const Matrix& m);
  std::optional<cpu::Norm> norm(const char* name, const Norm& n, int size);

  bool exact_;
  RanksPtr ranks_;
  std::vector<array> kept_;
  std::vector<TiledPtr> tiled_;
  std::vector<TermsPtr> terms_;
};

using BlockPtr = std::shared_ptr<DecoderBlock>;

} // namespace optiq
