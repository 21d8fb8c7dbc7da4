#include "ops/tiled_weight.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>
#include <mlx/transforms.h>

#include <limits>

#include "ops/fail.h"

namespace optiq {
namespace {

constexpr const char* kName = "tiled_weight";
constexpr uintptr_t kLine = 64;

[[noreturn]] void no_gpu() {
  throw std::runtime_error("[tiled_weight] the tiles are those of the CPU; run it there");
}

class Untile : public mx::Primitive {
 public:
  Untile(mx::Stream stream, cpu::Weight weight) : Primitive(stream), weight_(weight) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& out) override {
    prepare(inputs, out, stream());
    mx::cpu::get_command_encoder(stream()).dispatch(
        [w = weight_, codes = out[0].data<char>(), scales = out[1].data<char>(),
            biases = out[2].data<char>()] { cpu::kernels().untile(w, codes, scales, biases); });
  }
  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    no_gpu();
  }
  DEFINE_NAME(OptiqUntile)

 private:
  cpu::Weight weight_; // in the input
};

class TiledMatmul : public mx::UnaryPrimitive {
 public:
  TiledMatmul(mx::Stream stream, TiledPtr weight, bool exact)
      : UnaryPrimitive(stream), weight_(std::move(weight)), exact_(exact) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    array x = row_contiguous(inputs[0], stream());
    cpu::Weight w = weight_->view();
    w.exact = exact_ && x.dtype() == mx::float32;
    eval_matmul(x, w, 1, true, std::nullopt, out, stream());
    // The graph lets go of this primitive, and the weight with it, before the kernel has run.
    mx::cpu::get_command_encoder(stream()).dispatch([weight = weight_] {});
  }
  void eval_gpu(const std::vector<array>&, array&) override {
    no_gpu();
  }
  DEFINE_NAME(OptiqTiledMatmul)

 private:
  TiledPtr weight_;
  bool exact_;
};

} // namespace

TiledWeight::TiledWeight(const AffineWeight& w)
    : weight_(w.view()),
      dtype_(w.scales.dtype()),
      data_(mx::allocator::malloc(weight_.nbytes() + kLine), {int(weight_.nbytes() + kLine)},
          mx::uint8) {
  void* to = const_cast<void*>(view().data);
  cpu::kernels().tile(weight_, to);
}

TiledPtr TiledWeight::make(const AffineWeight& given) {
  given.shape(kName);
  AffineWeight w{mx::contiguous(given.codes), mx::contiguous(given.scales),
      mx::contiguous(given.biases), given.format};
  if (w.codes.ndim() != 2 || w.codes.size() == 0 || w.codes.is_tracer() ||
      w.codes.nbytes() > std::numeric_limits<int>::max() / 2) {
    return nullptr;
  }
  mx::eval({w.codes, w.scales, w.biases});
  return cpu::kernels().can_tile(w.view()) ? TiledPtr(new TiledWeight(w)) : nullptr;
}

cpu::Weight TiledWeight::view() const {
  cpu::Weight w = weight_;
  auto at = reinterpret_cast<uintptr_t>(data_.data<char>());
  w.data = reinterpret_cast<const void*>((at + kLine - 1) / kLine * kLine);
  w.scales = w.biases = nullptr;
  w.tiled = true;
  return w;
}

std::vector<array> TiledWeight::arrays() const {
  int rows = weight_.rows, groups = int(weight_.groups());
  int words = weight_.cols / 32 * weight_.format.bits;
  return array::make_arrays({{rows, words}, {rows, groups}, {rows, groups}},
      {mx::uint32, dtype_, dtype_},
      std::make_shared<Untile>(mx::default_stream(mx::Device::cpu), view()), {data_});
}

array TiledWeight::product(const array& x, const TiledPtr& w, bool exact, mx::StreamOrDevice s) {
  const cpu::Weight& weight = w->weight_;
  require_floating(kName, "x", x);
  auto shape = matmul_shape(kName, x, {weight.rows, weight.cols}, true, std::nullopt);
  return array(std::move(shape), mx::promote_types(x.dtype(), w->dtype_),
      std::make_shared<TiledMatmul>(mx::to_stream(s), w, exact), {x});
}

} // namespace optiq
