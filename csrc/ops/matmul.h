// What the dense and the quantized product share: shapes, and the CPU evaluation.
#pragma once

#include <optional>
#include <vector>

#include <mlx/array.h>
#include <mlx/stream.h>

#include "cpu/types.h"

namespace optiq {

namespace mx = mlx::core;
using mx::array; // as the macros of mlx/primitives.h expect

cpu::Float float_type(mx::Dtype dtype);

// Throws std::invalid_argument("[op] name ...") unless the array is float32, float16 or bfloat16.
void require_floating(const char* op, const char* name, const mx::array& a);

// With `indices`, x is [rows, in], indices is [rows] and names for each row one of several
// weights stacked in the first axis. Returns the output shape.
mx::Shape matmul_shape(const char* op, const mx::array& x, const mx::Shape& weight, bool transpose,
    const std::optional<mx::array>& indices);

// Row-major copy where needed; the copy lives until the stream has used it.
mx::array row_contiguous(const mx::array& a, mx::Stream stream);

// Row-major inputs, registered with the stream, and allocated outputs.
std::vector<mx::array> prepare(
    const std::vector<mx::array>& inputs, std::vector<mx::array>& outs, mx::Stream stream);

// Fills `out`, allocated here, with the product on the stream's CPU thread.
void eval_matmul(const mx::array& x, const cpu::Weight& weight, int experts, bool transpose,
    const std::optional<mx::array>& indices, mx::array& out, mx::Stream stream);

// One of several products with the same x: y [rows, w.rows], of type `type`.
struct Projection {
  cpu::Weight w;
  char* y;
  cpu::Float type;
};

// Every y = x @ w.T for x [rows, cols]; on the stream's CPU thread.
void multiply(
    const char* x, cpu::Float type, int rows, int cols, const std::vector<Projection>& projections);

} // namespace optiq
