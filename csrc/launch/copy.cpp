#include "launch/copy.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "../metal/shapes.h"

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
  CopyShape constants{};
  constants.size = 1;
  constants.axes = int(shape.size());
  for (size_t i = 0; i < shape.size(); i++) {
    constants.size *= shape[i];
    constants.shape[i] = shape[i];
    constants.strides[i] = strides[i];
  }
  Plan plan;
  if (constants.size == 0) {
    return plan;
  }
  Launch launch;
  launch.source = "copy.metal";
  launch.kernel = std::string("copy_rows_") + type;
  launch.instantiation = std::string("copy_rows<") + type + ">";
  Argument bytes{Argument::Kind::constants};
  bytes.bytes.resize(sizeof(constants));
  std::memcpy(bytes.bytes.data(), &constants, sizeof(constants));
  launch.arguments = {{Argument::Kind::input, 0}, {Argument::Kind::output, 0}, bytes};
  launch.threads.x = 256;
  launch.threadgroups.x = uint32_t((constants.size + 255) / 256);
  plan.launches.push_back(launch);
  return plan;
}

} // namespace optiq::launch
