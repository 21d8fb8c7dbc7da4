// What planners share: instantiations by their template arguments, and constants as bytes.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "cpu/types.h"
#include "launch/plan.h"

namespace optiq::launch {

inline const char* metal_name(cpu::Float type) {
  switch (type) {
    case cpu::Float::f32:
      return "float";
    case cpu::Float::f16:
      return "half";
    default:
      return "bfloat";
  }
}

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// "qmv" of "half" and "16" -> instantiation "qmv<half, 16>", host name "qmv_half_16".
inline Launch instantiate(
    const char* source, const std::string& function, const std::vector<std::string>& arguments) {
  Launch out;
  out.source = source;
  out.kernel = function;
  out.instantiation = function + "<";
  for (size_t i = 0; i < arguments.size(); i++) {
    out.kernel.append("_").append(arguments[i]);
    out.instantiation.append(i ? ", " : "").append(arguments[i]);
  }
  out.instantiation += ">";
  return out;
}

template <class Shape>
Argument constants(const Shape& shape) {
  Argument out{Argument::Kind::constants};
  out.bytes.resize(sizeof(shape));
  std::memcpy(out.bytes.data(), &shape, sizeof(shape));
  return out;
}

} // namespace optiq::launch
