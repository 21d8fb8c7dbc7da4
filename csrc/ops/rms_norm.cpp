#include "ops/rms_norm.h"

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "ops/fail.h"
#include "ops/matmul.h"

namespace optiq {
namespace {

class RmsNorm : public mx::UnaryPrimitive {
 public:
  RmsNorm(mx::Stream stream, float eps) : UnaryPrimitive(stream), eps_(eps) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    std::vector<array> outs = {out};
    auto in = prepare(inputs, outs, stream());
    out = outs[0];
    size_t dims = in[1].size();
    cpu::RmsNorm norm{in[0].data<float>(), nullptr, in[1].data<float>(), out.data<float>(),
        in[0].size() / dims, int(dims), eps_, 1, true};
    mx::cpu::get_command_encoder(stream()).dispatch([norm] { cpu::kernels().rms_norm(norm); });
  }
  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("[rms_norm] runs on the CPU");
  }
  DEFINE_NAME(OptiqRmsNorm)

 private:
  float eps_;
};

} // namespace

array rms_norm(const array& x, const array& weight, float eps, mx::StreamOrDevice s) {
  if (x.ndim() < 1 || x.size() == 0 || weight.shape() != mx::Shape{x.shape(-1)} ||
      x.dtype() != mx::float32) {
    fail("rms_norm", "x is ", x.shape(), " ", x.dtype(), " and the weight ", weight.shape(),
        "; they must be [..., dims] float32, not empty, and [dims]");
  }
  return array(x.shape(), mx::float32, std::make_shared<RmsNorm>(mx::to_stream(s), eps),
      {x, mx::astype(weight, mx::float32, s)});
}

} // namespace optiq
