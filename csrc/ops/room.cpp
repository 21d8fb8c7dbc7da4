#include "ops/room.h"

#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

namespace optiq {
namespace {

class Room : public mx::Primitive {
 public:
  explicit Room(mx::Stream stream) : Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>& out) override {
    out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[room] runs on the CPU");
  }
  DEFINE_NAME(OptiqRoom)
};

} // namespace

mx::array room(const mx::Shape& shape, mx::Dtype dtype, mx::StreamOrDevice s) {
  mx::Stream stream = mx::to_stream(s);
  if (stream.device != mx::Device::cpu) {
    return mx::zeros(shape, dtype, stream);
  }
  return mx::array(shape, dtype, std::make_shared<Room>(stream), {});
}

} // namespace optiq
