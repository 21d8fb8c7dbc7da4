#include "launch/low_rank.h"

#include <stdexcept>
#include <string>

#include "../metal/low_rank_shape.h"
#include "launch/instantiate.h"

namespace optiq::launch {

Plan plan_low_rank(const LowRankOp& op) {
  using Kind = Argument::Kind;
  if (op.rank < 8 || op.rank % 8 != 0 || op.in < 1 || op.slots < 1) {
    throw std::invalid_argument("[plan_low_rank] rank is " + std::to_string(op.rank) + " and in " +
                                std::to_string(op.in) + ", in " + std::to_string(op.slots) +
                                " slots; the rank must be a multiple of 8, and all positive");
  }
  Plan plan;
  if (op.rows == 0 || op.out == 0) {
    return plan;
  }
  plan.temporaries = {size_t(op.rows) * op.rank * sizeof(float)};
  LowRankShape shape{op.in, op.out, op.rank, op.slots};
  for (bool down : {true, false}) {
    const char* kernel = down ? "low_rank_down" : "low_rank_up";
    Launch launch = instantiate("low_rank.metal", kernel, {metal_name(op.type)});
    Argument x{Kind::input, 0}, h{Kind::temporary, 0}, y{Kind::output, 0}, slots{Kind::input, 3};
    launch.arguments = {
        down ? x : h, {Kind::input, down ? 1 : 2}, slots, down ? h : y, constants(shape)};
    launch.threadgroups = {uint32_t(down ? op.rank / 8 : ceil_div(op.out, 256)), uint32_t(op.rows)};
    launch.threads.x = 256;
    plan.launches.push_back(launch);
  }
  return plan;
}

} // namespace optiq::launch
