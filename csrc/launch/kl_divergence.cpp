#include "launch/kl_divergence.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../metal/kl_shape.h"
#include "cpu/affine_format.h"
#include "launch/instantiate.h"

namespace optiq::launch {

namespace {

constexpr int kTile = 32;          // tokens and words of a tile, as in kl_divergence.metal
constexpr int kThreadgroups = 512; // wanted: several for each core of the largest GPU
constexpr int kLeastStrips = 8;    // of a range: below, merging is no longer small work

void check(char side, const Head& head) {
  auto fail = [&](const std::string& message) {
    throw std::invalid_argument("[plan_kl_divergence] " + message);
  };
  std::string name = std::string(1, side);
  if (head.d < 1) {
    fail(name + ".d is " + std::to_string(head.d) + "; it must be at least 1");
  }
  if (head.format.dense()) {
    return;
  }
  check_format("plan_kl_divergence", name + ".", head.format);
  if (head.d % head.format.group_size != 0) {
    fail(name + ".d is " + std::to_string(head.d) + ", no multiple of " +
         std::to_string(head.format.group_size));
  }
}

int shift(const Head& head) {
  return head.format.group_size == 32 ? 5 : head.format.group_size == 64 ? 6 : 7;
}

} // namespace

Plan plan_kl_divergence(const KlDivergenceOp& op) {
  using Kind = Argument::Kind;
  check('p', op.p);
  check('q', op.q);
  if (op.vocabulary < 1 || op.tokens < 0) {
    throw std::invalid_argument("[plan_kl_divergence] tokens is " + std::to_string(op.tokens) +
                                " and vocabulary " + std::to_string(op.vocabulary) +
                                "; they must be at least 0 and 1");
  }
  Plan plan;
  if (op.tokens == 0) {
    return plan;
  }
  int tiles = (op.tokens + kTile - 1) / kTile, strips = (op.vocabulary + kTile - 1) / kTile;
  int most = std::max(1, strips / kLeastStrips);
  KlShape shape{};
  shape.tokens = op.tokens;
  shape.vocabulary = op.vocabulary;
  shape.splits = std::clamp((kThreadgroups + tiles - 1) / tiles, 1, most);
  shape.d_p = op.p.d;
  shape.d_q = op.q.d;
  shape.shift_p = shift(op.p);
  shape.shift_q = shift(op.q);
  shape.soft_cap = op.soft_cap;
  plan.temporaries = {size_t(shape.splits) * op.tokens * sizeof(KlPart)};

  Launch ranges = instantiate("kl_divergence.metal", "kl_ranges",
      {metal_name(op.p.type), std::to_string(op.p.format.bits), metal_name(op.q.type),
          std::to_string(op.q.format.bits)});
  int input = 2;
  for (int side = 0; side < 2; side++) {
    bool dense = (side == 0 ? op.p : op.q).format.dense();
    ranges.arguments.push_back({Kind::input, side});
    for (int i = 0; i < 3; i++) { // a dense head in all three places, so that each is bound
      ranges.arguments.push_back({Kind::input, dense ? input : input + i});
    }
    input += dense ? 1 : 3;
  }
  ranges.arguments.push_back({Kind::temporary, 0});
  ranges.arguments.push_back(constants(shape));
  ranges.threadgroups = {uint32_t(shape.splits), uint32_t(tiles)};
  ranges.threads.x = 128;

  Launch merge = instantiate("kl_divergence.metal", "kl_merge", {"float"});
  merge.arguments = {{Kind::temporary, 0}};
  for (int i = 0; i < 4; i++) {
    merge.arguments.push_back({Kind::output, i});
  }
  merge.arguments.push_back(constants(shape));
  merge.threads.x = 64;
  merge.threadgroups.x = uint32_t((op.tokens + 63) / 64);
  plan.launches = {ranges, merge};
  return plan;
}

} // namespace optiq::launch
