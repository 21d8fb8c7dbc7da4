#include "launch/copy.h"

#include <stdexcept>
#include <string>

#include "../metal/shapes.h"
#include "launch/instantiate.h"

namespace optiq::launch {

Plan plan_row_contiguous(
    const std::vector<int>& shape, const std::vector<int64_t>& strides, size_t itemsize) {
  const char* type = itemsize == 1   ? "uchar"
                     : itemsize == 2 ? "ushort"
                     : itemsize == 4 ? "uint"
                     : itemsize == 8 ? "ulong"
                                     : nullptr;
  if (!type || shape.size() > 8) {
    throw std::invalid_argument("[copy] an array of " + std::to_string(shape.size()) +
                                " axes and " + std::to_string(itemsize) +
                                " bytes an item; call mx.contiguous first");
  }
  CopyShape copy{};
  copy.size = 1;
  copy.axes = int(shape.size());
  for (size_t i = 0; i < shape.size(); i++) {
    copy.size *= shape[i];
    copy.shape[i] = shape[i];
    copy.strides[i] = strides[i];
  }
  Plan plan;
  if (copy.size == 0) {
    return plan;
  }
  Launch launch = instantiate("copy.metal", "copy_rows", {type});
  launch.arguments = {{Argument::Kind::input, 0}, {Argument::Kind::output, 0}, constants(copy)};
  launch.threads.x = 256;
  launch.threadgroups.x = uint32_t((copy.size + 255) / 256);
  plan.launches.push_back(launch);
  return plan;
}

} // namespace optiq::launch
