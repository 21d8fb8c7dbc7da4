// Which affine formats there are kernels for: the only list of them in C++.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/types.h"

namespace optiq {

/** Of keys and values there are records in fewer formats than of weights. */
enum class Holds { weights, keys_and_values };

/** Throws, naming `name`bits or `name`group_size, where there is no kernel. */
inline void check_format(const std::string& op, const std::string& name, AffineFormat format,
    Holds holds = Holds::weights) {
  auto check = [&](bool fits, const char* what, int value, const char* limit) {
    if (!fits) {
      throw std::invalid_argument(
          "[" + op + "] " + name + what + " is " + std::to_string(value) + "; it must be " + limit);
    }
  };
  auto [bits, group_size] = format;
  bool weights = holds == Holds::weights;
  check(bits >= (weights ? 2 : 3) && bits <= 8 && bits != 7, "bits", bits,
      weights ? "2, 3, 4, 5, 6 or 8" : "3, 4, 5, 6 or 8 for keys and values");
  check(group_size == 32 || group_size == 64 || (weights && group_size == 128), "group_size",
      group_size, weights ? "32, 64 or 128" : "32 or 64 for keys and values");
}

} // namespace optiq
