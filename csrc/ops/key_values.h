// What attention reads beside its queries: keys, values and which of them a query sees. Checked
// when a graph is built, then inputs of a primitive that knows how to read them.
#pragma once

#include <string>

#include "ops/kv_records.h"

namespace optiq {

struct AttentionShape {
  int batch, heads, kv_heads, rows, dim, value_dim;
};

// Which inputs there are, and their meaning.
struct KeyValueLayout {
  AffineFormat k_format, v_format; // dense: plain vectors
  cpu::Masking masking = cpu::Masking::none;
  int window = 0;
  bool mask = false, starts = false, first = false, recent = false;

  bool operator==(const KeyValueLayout&) const = default;

  // Sets keys and values, unless they are null, and all else from the inputs that
  // KeyValues::append() made, the first of them at `in`.
  void set(
      cpu::Attention& a, const array* k, const array* v, const array* in, mx::Stream stream) const;
};

struct KeyValues {
  using Pair = std::pair<array, array>; // keys, values

  AffineFormat k_format, v_format; // dense: plain vectors
  std::string masking;             // "" or "causal"; ignored with a mask
  std::optional<array> mask;
  int window = 0; // 0: none
  std::optional<array> starts;
  std::optional<Pair> first, recent;

  /** Throws std::invalid_argument("[op] ...") where these do not fit `keys` keys. */
  KeyValueLayout check(const char* op, const AttentionShape& shape, int keys) const;
  /** Nor the first `keys` (or all) of k and v, which need not fit each other either. */
  KeyValueLayout check(const char* op, const AttentionShape& shape, const array& k, const array& v,
      std::optional<int> keys = {}) const;

  // What there is of mask, starts, first and recent vectors.
  void append(std::vector<array>& inputs, mx::StreamOrDevice s) const;
};

} // namespace optiq
