#include "ops/dequantize.h"

#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>

#include "ops/matmul.h"

namespace optiq {
namespace {

class Dequantize : public mx::UnaryPrimitive {
 public:
  Dequantize(mx::Stream stream, AffineFormat format) : UnaryPrimitive(stream), format_(format) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    std::vector<array> outs = {out};
    auto in = prepare(inputs, outs, stream());
    out = outs[0];
    if (out.size() == 0) {
      return;
    }
    cpu::Weight w = AffineWeight{in[0], in[1], in[2], format_}.view();
    w.rows = int(out.size() / w.cols); // of all experts
    mx::cpu::get_command_encoder(stream()).dispatch(
        [w, y = out.data<float>()] { cpu::kernels().dequantize(w, y); });
  }
  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("[dequantize] runs on the CPU");
  }
  DEFINE_NAME(OptiqDequantize)

 private:
  AffineFormat format_;
};

} // namespace

array dequantize(const AffineWeight& w, mx::StreamOrDevice s) {
  return array(w.shape("dequantize"), mx::float32,
      std::make_shared<Dequantize>(mx::to_stream(s), w.format), {w.codes, w.scales, w.biases});
}

} // namespace optiq
