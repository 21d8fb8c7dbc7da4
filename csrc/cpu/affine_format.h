// The affine formats for which there are kernels.
#pragma once

#include <stdexcept>
#include <string>

namespace optiq::cpu {

inline bool affine_bits(int bits) {
  return bits >= 2 && bits <= 8 && bits != 7;
}

inline bool affine_group(int group_size) {
  return group_size == 32 || group_size == 64 || group_size == 128;
}

/** Throws, naming `name`bits or `name`group_size, where there is no kernel. */
inline void check_affine_format(
    const std::string& op, const std::string& name, int bits, int group_size) {
  auto fail = [&](const char* what, int value, const char* limit) {
    throw std::invalid_argument(
        "[" + op + "] " + name + what + " is " + std::to_string(value) + "; it must be " + limit);
  };
  if (!affine_bits(bits)) {
    fail("bits", bits, "2, 3, 4, 5, 6 or 8");
  }
  if (!affine_group(group_size)) {
    fail("group_size", group_size, "32, 64 or 128");
  }
}

} // namespace optiq::cpu
