// From a width of codes known at run time to code compiled for it: the one list of widths.
#pragma once

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

template <int BITS>
struct Width {};

// f(Width<bits>{}); the checks of an op have made sure that the width is one of these.
template <class F>
OPTIQ_INLINE auto at_width(int bits, F&& f) {
  switch (bits) {
    case 2:
      return f(Width<2>{});
    case 3:
      return f(Width<3>{});
    case 4:
      return f(Width<4>{});
    case 5:
      return f(Width<5>{});
    case 6:
      return f(Width<6>{});
    default:
      return f(Width<8>{});
  }
}

// The same where a weight may be dense, which is width 0.
template <class F>
OPTIQ_INLINE auto at_width_or_dense(int bits, F&& f) {
  return bits == 0 ? f(Width<0>{}) : at_width(bits, f);
}

} // namespace optiq::cpu::OPTIQ_ISA
