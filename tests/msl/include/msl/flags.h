// What barriers fence, and what lanes vote: plain values, the same wherever the lanes run.
#pragma once

namespace metal {
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_device_and_threadgroup = 3,
  mem_texture = 4
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  constexpr explicit simd_vote(vote_t votes = 0) : v(votes) {}
  bool all() const {
    return uint(v) == 0xffffffffu;
  }
  bool any() const {
    return v != 0;
  }
  constexpr explicit operator vote_t() const {
    return v;
  }
};
} // namespace metal
