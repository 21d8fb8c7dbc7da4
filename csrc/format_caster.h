// Formats come from Python as MLX orders its arguments: (group size, bits), or (0, 0) where nothing
// is quantized.
#pragma once

#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include "cpu/types.h"

namespace nanobind::detail {

template <>
struct type_caster<optiq::AffineFormat> {
  using Pair = std::pair<int, int>;
  NB_TYPE_CASTER(optiq::AffineFormat, make_caster<Pair>::Name)

  bool from_python(handle source, uint8_t flags, cleanup_list* cleanup) noexcept {
    make_caster<Pair> pair;
    if (!pair.from_python(source, flags, cleanup)) {
      return false;
    }
    auto [group_size, bits] = static_cast<Pair>(pair);
    value = {.bits = bits, .group_size = group_size};
    return true;
  }

  static handle from_cpp(
      optiq::AffineFormat format, rv_policy policy, cleanup_list* cleanup) noexcept {
    return make_caster<Pair>::from_cpp(Pair(format.group_size, format.bits), policy, cleanup);
  }
};

} // namespace nanobind::detail
