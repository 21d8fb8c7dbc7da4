#include "ops/rotary.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>

#include "cpu/block.h"
#include "ops/fail.h"
#include "ops/matmul.h"

namespace optiq {
namespace {

// x is what a layer wrote, token by token, and the result what attention reads, head by head; of
// the gradient it is the other way round. So neither is copied.
class Rotary : public mx::UnaryPrimitive {
 public:
  Rotary(mx::Stream stream, cpu::Rope rope, int64_t offset, bool back)
      : UnaryPrimitive(stream), rope_(std::move(rope)), offset_(offset), back_(back) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    array x = inputs[0].strides(3) == 1 ? inputs[0] : row_contiguous(inputs[0], stream());
    auto& encoder = mx::cpu::get_command_encoder(stream());
    int batch = x.shape(0), heads = x.shape(1), rows = x.shape(2), dim = x.shape(3);
    int64_t head = back_ ? dim : int64_t(rows) * dim, row = back_ ? int64_t(heads) * dim : dim;
    bool plain = !back_ || heads == 1 || rows == 1;
    out.set_data(mx::allocator::malloc(out.nbytes()), out.size(),
        {int64_t(heads) * rows * dim, head, row, 1}, {true, plain, out.size() <= 1});
    encoder.set_input_array(x);
    encoder.set_output_array(out);
    cpu::Rotary work{x.data<float>(), size_t(x.strides(0)), size_t(x.strides(1)),
        size_t(x.strides(2)), out.data<float>(), size_t(heads) * rows * dim, size_t(head),
        size_t(row), nullptr, batch, heads, rows, dim, rope_.dims, rope_.traditional, back_};
    encoder.dispatch([work, rope = rope_, offset = offset_]() mutable {
      work.cos_sin = cpu::turns(rope, 1, work.rows, {&offset});
      cpu::kernels().rotary(work);
    });
  }

  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("[rotary] has no GPU kernel; use mx.fast.rope there");
  }

  std::vector<array> vjp(const std::vector<array>& primals, const std::vector<array>& cotangents,
      const std::vector<int>&, const std::vector<array>&) override {
    auto turned = std::make_shared<Rotary>(stream(), rope_, offset_, !back_);
    return {array(primals[0].shape(), mx::float32, turned, {cotangents[0]})};
  }

  DEFINE_NAME(OptiqRotary)

 private:
  cpu::Rope rope_;
  int64_t offset_;
  bool back_;
};

} // namespace

array rotary(const array& x, int dims, bool traditional, const std::vector<double>& frequencies,
    double magnitude, int offset, mx::StreamOrDevice s) {
  if (x.ndim() != 4 || x.dtype() != mx::float32 || dims < 2 || dims > x.shape(3) ||
      size_t(dims) != 2 * frequencies.size()) {
    fail("rotary", "x is ", x.shape(), " ", x.dtype(), ", ", dims, " values turn, by ",
        frequencies.size(),
        " frequencies; they must be [batch, heads, rows, dim] float32, at "
        "most dim, and half of them");
  }
  cpu::Rope rope{dims, traditional, frequencies, magnitude};
  auto op = std::make_shared<Rotary>(mx::to_stream(s), std::move(rope), offset, false);
  return array(x.shape(), mx::float32, op, {x});
}

} // namespace optiq
