// A decoder layer for one new token of each batch entry, on a GPU: one primitive and few launches
// (csrc/launch/layer.h). It has no gradients and does not run on a CPU, where block_step does this.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

#include "launch/layer.h"
#include "metal/encoder.h"

namespace optiq {

namespace mx = mlx::core;

/** Where the new token goes in the caches, how many tokens they then have, and its position. */
struct TokenPlace {
  int token, keys, position;
};

/** A layer's weights and, for each number of batch entries, its plan. */
struct LaunchedLayer {
  using Strides = std::array<int64_t, 3>;
  struct Kept {
    launch::LayerPlan plan;
    metal::Compiled compiled = {};
  };

  launch::DecodeLayer described;
  mx::Dtype dtype = mx::float16; // of h
  std::vector<mx::array> arrays; // the inputs of launch::LayerInput that follow h
  std::mutex mutex;

  /** The plan of a token and its kernels. The next call changes it: who reads it holds `mutex`. */
  std::pair<const launch::Plan&, metal::Compiled&> plan(int batch, TokenPlace place,
      const Strides& k_strides, const Strides& v_strides, const launch::Tuning& tuning);
  int plans_made() const;

 private:
  std::map<int, Kept> kept_;
};

/** h [batch, 1, width] after the layer, and the caches [batch, kv_heads, S, ...] with the new
 * token: those given, if nobody else holds them, else copies. */
std::vector<mx::array> decode_layer(const std::shared_ptr<LaunchedLayer>& layer, const mx::array& h,
    const mx::array& keys, const mx::array& values, TokenPlace place, mx::StreamOrDevice s = {});

} // namespace optiq
