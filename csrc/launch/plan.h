// What to launch on a GPU, as plain data: tables in, tables out, no Metal and no MLX here.
// The Metal encoder (csrc/metal/encoder.cpp) and the tests that run the kernels on a CPU
// (tests/msl) both carry out these plans.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace optiq::launch {

struct Size {
  uint32_t x = 1, y = 1, z = 1;
};

// What the kernel finds at [[buffer(i)]], i being the place of the argument in its list.
struct Argument {
  enum class Kind : uint8_t { input, output, temporary, constants };
  Kind kind;
  int index = 0;                   // of the op's inputs, its outputs or the plan's temporaries
  std::vector<uint8_t> bytes = {}; // of constants
};

struct Launch {
  std::string source;        // file in metal/, such as "qmv.metal"
  std::string kernel;        // host name: unique for the instantiation
  std::string instantiation; // template and its arguments, such as "qmv<half, 64, 4>"
  std::vector<Argument> arguments;
  Size threadgroups; // in the grid
  Size threads;      // in a threadgroup
};

// Launches in order; each sees what the ones before it wrote.
struct Plan {
  std::vector<Launch> launches;
  std::vector<size_t> temporaries; // bytes of each
  std::vector<int> strided = {};   // inputs whose strides the kernels know; others are row-major
};

} // namespace optiq::launch
