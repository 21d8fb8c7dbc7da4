#include "launch/quantize.h"

#include <stdexcept>
#include <string>

#include "../metal/quantize_shape.h"
#include "cpu/affine_format.h"
#include "launch/instantiate.h"

namespace optiq::launch {

Plan plan_quantize(const QuantizeOp& op) {
  constexpr size_t kThreads = 256;
  auto fail = [](const std::string& message) {
    throw std::invalid_argument("[plan_quantize] " + message);
  };
  check_format("plan_quantize", "", op.format);
  if (op.cols % op.format.group_size != 0) {
    fail("cols is " + std::to_string(op.cols) + ", no multiple of " +
         std::to_string(op.format.group_size));
  }
  size_t octets = op.rows * op.cols / 8;
  if (octets > 0xffffffffu - kThreads) { // counted in 32 bits by the kernels
    fail("the weight has " + std::to_string(octets * 8) + " elements; split it below 2^35");
  }
  Plan plan;
  if (octets == 0) {
    return plan;
  }
  bool search = op.rows_per_importance > 0;
  Launch launch = instantiate("quantize.metal", search ? "quantize_search" : "quantize_minmax",
      {metal_name(op.type), std::to_string(op.format.bits), std::to_string(op.format.group_size)});
  using Kind = Argument::Kind;
  launch.arguments = {{Kind::input, 0}};
  if (search) {
    launch.arguments.push_back({Kind::input, 1});
  }
  for (int i = 0; i < 3; i++) {
    launch.arguments.push_back({Kind::output, i});
  }
  QuantizeShape shape{
      uint32_t(octets), uint32_t(op.cols), uint32_t(search ? op.rows_per_importance : 1)};
  launch.arguments.push_back(constants(shape));
  launch.threads.x = kThreads;
  launch.threadgroups.x = uint32_t((octets + kThreads - 1) / kThreads);
  plan.launches.push_back(launch);
  return plan;
}

} // namespace optiq::launch
