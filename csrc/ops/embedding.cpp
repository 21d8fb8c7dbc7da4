#include "ops/embedding.h"

#include <algorithm>
#include <limits>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "ops/fail.h"
#include "ops/matmul.h"

namespace optiq {
namespace {

constexpr const char* kName = "embedding";

class Embedding : public mx::UnaryPrimitive {
 public:
  Embedding(mx::Stream stream, AffineFormat format) : UnaryPrimitive(stream), format_(format) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    std::vector<array> outs = {out};
    auto in = prepare(inputs, outs, stream());
    out = outs[0];
    cpu::Weight w = AffineWeight{in[1], in[2], in[3], format_}.view();
    mx::cpu::get_command_encoder(stream()).dispatch(
        [w, ids = in[0].data<int32_t>(), n = in[0].size(), y = out.data<float>()] {
          embed_rows(w, ids, n, y);
        });
  }
  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("[embedding] runs on the CPU");
  }
  DEFINE_NAME(OptiqEmbedding)

 private:
  AffineFormat format_;
};

} // namespace

void embed_rows(const cpu::Weight& w, const int32_t* ids, size_t n, float* y) {
  cpu::Weight row = w;
  row.rows = 1;
  for (size_t i = 0; i < n; i++, y += w.cols) {
    int64_t id = ids[i] < 0 ? ids[i] + int64_t(w.rows) : ids[i];
    if (id < 0 || id >= w.rows) {
      std::fill_n(y, w.cols, std::numeric_limits<float>::quiet_NaN());
    } else {
      cpu::kernels().dequantize(row.expert(id), y);
    }
  }
}

array embedding(const array& ids, const AffineWeight& w, mx::StreamOrDevice s) {
  mx::Shape of_weight = w.shape(kName), shape = ids.shape();
  if (of_weight.size() != 2 || !mx::issubdtype(ids.dtype(), mx::integer)) {
    fail(kName, "ids are ", ids.dtype(), " and w ", of_weight,
        "; they must be integers and [rows, in]");
  }
  shape.push_back(of_weight[1]);
  return array(std::move(shape), mx::float32,
      std::make_shared<Embedding>(mx::to_stream(s), w.format),
      {mx::astype(ids, mx::int32, s), w.codes, w.scales, w.biases});
}

} // namespace optiq
