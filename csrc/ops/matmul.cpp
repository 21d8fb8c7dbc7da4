#include "ops/matmul.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/dtype_utils.h>

#include "ops/fail.h"

namespace optiq {

cpu::Float float_type(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float32:
      return cpu::Float::f32;
    case mx::Dtype::Val::float16:
      return cpu::Float::f16;
    case mx::Dtype::Val::bfloat16:
      return cpu::Float::bf16;
    default:
      throw std::invalid_argument("not a floating dtype of 16 or 32 bits");
  }
}

void require_floating(const char* op, const char* name, const mx::array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::float16 && a.dtype() != mx::bfloat16) {
    fail(op, name, " is ", a.dtype(), "; it must be float32, float16 or bfloat16");
  }
}

mx::Shape matmul_shape(const char* op, const mx::array& x, const mx::Shape& weight, bool transpose,
    const std::optional<mx::array>& indices) {
  size_t ndim = indices ? 3 : 2;
  if (weight.size() != ndim) {
    fail(op, "w has ", weight.size(), " axes; it must have ", ndim, indices ? " with indices" : "");
  }
  if (indices) {
    if (x.ndim() != 2 || indices->ndim() != 1 || indices->shape(0) != x.shape(0)) {
      fail(op, "with indices, x must be [rows, in] and indices [rows]; got x ", x.shape(),
          " and indices ", indices->shape());
    }
    if (indices->dtype() != mx::uint32) {
      fail(op, "indices must be uint32, got ", indices->dtype());
    }
  }
  if (x.ndim() == 0) {
    fail(op, "x must have at least one axis");
  }
  int rows = weight[ndim - 2], cols = weight[ndim - 1];
  int inner = transpose ? cols : rows;
  if (x.shape(-1) != inner) {
    fail(op, "the last axis of x is ", x.shape(-1), " but w takes ", inner);
  }
  auto shape = x.shape();
  shape.back() = transpose ? rows : cols;
  return shape;
}

mx::array row_contiguous(const mx::array& a, mx::Stream stream) {
  if (a.flags().row_contiguous) {
    return a;
  }
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  copy.set_data(mx::allocator::malloc(copy.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream);
  encoder.set_input_array(a);
  encoder.set_output_array(copy);
  encoder.dispatch([in = a.data<char>(), out = copy.data<char>(), shape = a.shape(),
                       strides = a.strides(), itemsize = a.itemsize(), n = a.size()]() {
    std::vector<int> at(shape.size(), 0);
    int64_t offset = 0;
    for (size_t i = 0; i < n; i++) {
      std::copy_n(in + offset * int64_t(itemsize), itemsize, out + i * itemsize);
      for (int axis = int(shape.size()) - 1; axis >= 0; axis--) {
        offset += strides[axis];
        if (++at[axis] < shape[axis]) {
          break;
        }
        offset -= strides[axis] * shape[axis];
        at[axis] = 0;
      }
    }
  });
  encoder.add_temporary(copy);
  return copy;
}

std::vector<mx::array> prepare(
    const std::vector<mx::array>& inputs, std::vector<mx::array>& outs, mx::Stream stream) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  std::vector<mx::array> in;
  for (const auto& a : inputs) {
    in.push_back(row_contiguous(a, stream));
    encoder.set_input_array(in.back());
  }
  for (auto& out : outs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  return in;
}

namespace {

using cpu::kernels;

// `n` values as float32, converted where they are not.
class Floats {
 public:
  Floats(const char* in, cpu::Float type, size_t n) {
    if (type != cpu::Float::f32) {
      converted_.resize(n);
      kernels().to_f32(in, type, converted_.data(), n);
    }
    data = type == cpu::Float::f32 ? reinterpret_cast<const float*>(in) : converted_.data();
  }

  const float* data;

 private:
  std::vector<float> converted_;
};

// Room for `n` float32 results, stored in their own type by store().
class Results {
 public:
  Results(char* out, cpu::Float type, size_t n) : out_(out), type_(type), n_(n) {
    if (type != cpu::Float::f32) {
      results_.resize(n);
    }
    data = type == cpu::Float::f32 ? reinterpret_cast<float*>(out) : results_.data();
  }
  void store() {
    if (type_ != cpu::Float::f32) {
      kernels().from_f32(data, type_, out_, n_);
    }
  }

  float* data;

 private:
  char* out_;
  cpu::Float type_;
  size_t n_;
  std::vector<float> results_;
};

// Rows that go to the same expert are brought together, so each expert is one product.
void grouped_matmul(const float* x, const cpu::Weight& w, int experts, bool transpose,
    const uint32_t* indices, int rows, float* y) {
  int in = transpose ? w.cols : w.rows;
  int out = transpose ? w.rows : w.cols;
  std::vector<int> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int a, int b) { return indices[a] < indices[b]; });
  std::vector<float> xs(size_t(rows) * in), ys(size_t(rows) * out);
  for (int i = 0; i < rows; i++) {
    std::copy_n(x + size_t(order[i]) * in, in, xs.data() + size_t(i) * in);
  }
  for (int begin = 0, end; begin < rows; begin = end) {
    uint32_t e = indices[order[begin]];
    for (end = begin; end < rows && indices[order[end]] == e; end++) {
    }
    float* ye = ys.data() + size_t(begin) * out;
    if (e < uint32_t(experts)) {
      kernels().matmul({xs.data() + size_t(begin) * in, w.expert(e), ye, end - begin, transpose});
    } else { // as an out-of-range gather: not a crash, and visible in the result
      std::fill_n(ye, size_t(end - begin) * out, std::numeric_limits<float>::quiet_NaN());
    }
  }
  for (int i = 0; i < rows; i++) {
    std::copy_n(ys.data() + size_t(i) * out, out, y + size_t(order[i]) * out);
  }
}

} // namespace

void eval_matmul(const mx::array& x, const cpu::Weight& weight, int experts, bool transpose,
    const std::optional<mx::array>& indices, mx::array& out, mx::Stream stream) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto& encoder = mx::cpu::get_command_encoder(stream);
  encoder.set_input_array(x);
  encoder.set_output_array(out);
  int in = transpose ? weight.cols : weight.rows;
  size_t rows = in == 0 ? 0 : x.size() / in;
  encoder.dispatch(
      [xp = x.data<char>(), x_type = float_type(x.dtype()), rows, in, weight, experts, transpose,
          ip = indices ? indices->data<uint32_t>() : nullptr, yp = out.data<char>(),
          y_type = float_type(out.dtype()), y_size = out.size()]() {
        if (in == 0) { // an empty sum
          std::fill_n(yp, y_size * cpu::size_of(y_type), 0);
          return;
        }
        Floats x(xp, x_type, rows * in);
        Results y(yp, y_type, y_size);
        if (ip) {
          grouped_matmul(x.data, weight, experts, transpose, ip, int(rows), y.data);
        } else {
          kernels().matmul({x.data, weight, y.data, int(rows), transpose});
        }
        y.store();
      });
}

void multiply(const char* x, cpu::Float type, int rows, int cols,
    const std::vector<Projection>& projections) {
  Floats floats(x, type, size_t(rows) * cols);
  std::vector<Results> results;
  std::vector<cpu::Part> parts;
  results.reserve(projections.size()); // parts point into it
  for (const auto& p : projections) {
    results.emplace_back(p.y, p.type, size_t(rows) * p.w.rows);
    if (p.w.rows > 0) {
      parts.push_back({p.w, results.back().data});
    }
  }
  kernels().products({floats.data, rows, parts.data(), int(parts.size())});
  for (auto& r : results) {
    r.store();
  }
}

} // namespace optiq
