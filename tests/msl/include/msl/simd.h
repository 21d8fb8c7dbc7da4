// <metal_simdgroup> and <metal_quadgroup>: simdgroups of 32 lanes.
#pragma once

namespace metal {
// The runtime names these in its reports and counts them (rt/runtime.h has the same list).
enum _simd_op : uint {
  _op_sum = 1,
  _op_product,
  _op_min,
  _op_max,
  _op_and,
  _op_or,
  _op_xor,
  _op_prefix,
  _op_shuffle,
  _op_broadcast,
  _op_vote,
  _op_quad
};

template <class T>
struct _lanes {
  thread const uchar* slots;
  uint active;
  MSL_FN T at(uint lane) const {
    return *(thread const T*)(slots + 32 * (lane & 31));
  }
  MSL_FN bool on(uint lane) const {
    return (active >> lane) & 1;
  }
};
template <class T>
MSL_FN _lanes<T> _exchange(T value, uint op) {
  static_assert(sizeof(T) <= 32, "simdgroup functions take at most 32 bytes");
  static_assert(!__is_same(T, bfloat), "Metal has no simdgroup function for bfloat: use float");
  _lanes<T> lanes;
  lanes.slots = __msl_exchange(&value, sizeof(T), op);
  lanes.active = __msl_active();
  return lanes;
}

// Reductions pair neighbours, then pairs, and so on. Apple does not say which order it takes.
#define MSL_REDUCTION(name, op, expression)           \
  template <class T>                                  \
  MSL_FN T name(T value) {                            \
    const _lanes<T> lanes = _exchange(value, op);     \
    T a[32];                                          \
    uint n = 0;                                       \
    for (uint i = 0; i < 32; i++) {                   \
      if (lanes.on(i)) {                              \
        a[n++] = lanes.at(i);                         \
      }                                               \
    }                                                 \
    for (uint step = 1; step < n; step *= 2) {        \
      for (uint i = 0; i + step < n; i += 2 * step) { \
        const T p = a[i], q = a[i + step];            \
        a[i] = T(expression);                         \
      }                                               \
    }                                                 \
    return a[0];                                      \
  }
MSL_REDUCTION(simd_sum, _op_sum, p + q)
MSL_REDUCTION(simd_product, _op_product, p* q)
MSL_REDUCTION(simd_min, _op_min, min(p, q))
MSL_REDUCTION(simd_max, _op_max, max(p, q))
MSL_REDUCTION(simd_and, _op_and, p& q)
MSL_REDUCTION(simd_or, _op_or, p | q)
MSL_REDUCTION(simd_xor, _op_xor, p ^ q)
#undef MSL_REDUCTION
// The two that kernels live on are computed once, by the lane that comes last.
MSL_FN float simd_sum(float value) {
  return __msl_sum(value);
}
MSL_FN float simd_max(float value) {
  return __msl_max(value);
}
MSL_FN half simd_sum(half value) {
  return half(__msl_sum(float(value)));
}
MSL_FN half simd_max(half value) {
  return half(__msl_max(float(value)));
}

#define MSL_QUAD_REDUCTION(name, expression)            \
  template <class T>                                    \
  MSL_FN T name(T value) {                              \
    const _lanes<T> lanes = _exchange(value, _op_quad); \
    const uint first = __msl_lane() & ~3u;              \
    T p = value;                                        \
    bool empty = true;                                  \
    for (uint i = first; i < first + 4; i++) {          \
      if (lanes.on(i)) {                                \
        const T q = lanes.at(i);                        \
        p = empty ? q : T(expression);                  \
        empty = false;                                  \
      }                                                 \
    }                                                   \
    return p;                                           \
  }
MSL_QUAD_REDUCTION(quad_sum, p + q)
MSL_QUAD_REDUCTION(quad_product, p* q)
MSL_QUAD_REDUCTION(quad_min, min(p, q))
MSL_QUAD_REDUCTION(quad_max, max(p, q))
#undef MSL_QUAD_REDUCTION

#define MSL_PREFIX(name, expression, identity, inclusive) \
  template <class T>                                      \
  MSL_FN T name(T value) {                                \
    const _lanes<T> lanes = _exchange(value, _op_prefix); \
    T p = T(identity);                                    \
    for (uint i = 0; i < __msl_lane() + inclusive; i++) { \
      if (lanes.on(i)) {                                  \
        const T q = lanes.at(i);                          \
        p = T(expression);                                \
      }                                                   \
    }                                                     \
    return p;                                             \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, p + q, 0, 1)
MSL_PREFIX(simd_prefix_exclusive_sum, p + q, 0, 0)
MSL_PREFIX(simd_prefix_inclusive_product, p* q, 1, 1)
MSL_PREFIX(simd_prefix_exclusive_product, p* q, 1, 0)
#undef MSL_PREFIX

// A lane that is not active hands in poison (all bits set), as a real one hands in anything.
template <class T>
MSL_FN T simd_shuffle(T value, ushort lane) {
  return _exchange(value, _op_shuffle).at(lane);
}
template <class T>
MSL_FN T simd_shuffle_xor(T value, ushort mask) {
  return _exchange(value, _op_shuffle).at(__msl_lane() ^ mask);
}
template <class T>
MSL_FN T simd_shuffle_down(T value, ushort delta) {
  const _lanes<T> lanes = _exchange(value, _op_shuffle);
  const uint lane = __msl_lane() + delta;
  return lane < 32 ? lanes.at(lane) : value;
}
template <class T>
MSL_FN T simd_shuffle_up(T value, ushort delta) {
  const _lanes<T> lanes = _exchange(value, _op_shuffle);
  const uint lane = __msl_lane();
  return lane >= delta ? lanes.at(lane - delta) : value;
}
template <class T>
MSL_FN T simd_shuffle_rotate_down(T value, ushort delta) {
  return _exchange(value, _op_shuffle).at(__msl_lane() + delta);
}
template <class T>
MSL_FN T simd_shuffle_rotate_up(T value, ushort delta) {
  return _exchange(value, _op_shuffle).at(__msl_lane() - delta);
}
template <class T>
struct _filled {
  T value, fill;
};
template <class T>
MSL_FN T simd_shuffle_and_fill_down(T value, T fill, ushort delta, ushort modulo = 32) {
  const _filled<T> mine = {value, fill};
  const _lanes<_filled<T>> lanes = _exchange(mine, _op_shuffle);
  const uint lane = __msl_lane(), first = lane - lane % modulo, from = lane % modulo + delta;
  return from < modulo ? lanes.at(first + from).value : lanes.at(first + from - modulo).fill;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_up(T value, T fill, ushort delta, ushort modulo = 32) {
  const _filled<T> mine = {value, fill};
  const _lanes<_filled<T>> lanes = _exchange(mine, _op_shuffle);
  const uint lane = __msl_lane(), first = lane - lane % modulo, at = lane % modulo;
  return at >= delta ? lanes.at(first + at - delta).value
                     : lanes.at(first + modulo + at - delta).fill;
}
template <class T>
MSL_FN T simd_broadcast(T value, ushort lane) {
  return _exchange(value, _op_broadcast).at(lane);
}
template <class T>
MSL_FN T simd_broadcast_first(T value) {
  const _lanes<T> lanes = _exchange(value, _op_broadcast);
  return lanes.at(__builtin_ctz(lanes.active));
}

template <class T>
MSL_FN T quad_shuffle(T value, ushort lane) {
  return _exchange(value, _op_quad).at((__msl_lane() & ~3u) | (lane & 3));
}
template <class T>
MSL_FN T quad_shuffle_xor(T value, ushort mask) {
  return _exchange(value, _op_quad).at(__msl_lane() ^ (mask & 3));
}
template <class T>
MSL_FN T quad_broadcast(T value, ushort lane) {
  return quad_shuffle(value, lane);
}
template <class T>
MSL_FN T quad_shuffle_down(T value, ushort delta) {
  const _lanes<T> lanes = _exchange(value, _op_quad);
  return (__msl_lane() & 3) + delta < 4 ? lanes.at(__msl_lane() + delta) : value;
}
template <class T>
MSL_FN T quad_shuffle_up(T value, ushort delta) {
  const _lanes<T> lanes = _exchange(value, _op_quad);
  return (__msl_lane() & 3) >= delta ? lanes.at(__msl_lane() - delta) : value;
}

struct _votes {
  uint yes, active;
};
MSL_FN _votes _vote(bool mine) {
  const _lanes<uint> lanes = _exchange(uint(mine), _op_vote);
  _votes votes = {0, lanes.active};
  for (uint i = 0; i < 32; i++) {
    votes.yes |= uint(lanes.on(i) && lanes.at(i)) << i;
  }
  return votes;
}
MSL_FN simd_vote simd_ballot(bool mine) {
  return simd_vote(_vote(mine).yes);
}
MSL_FN simd_vote simd_active_threads_mask() {
  return simd_vote(_vote(true).yes);
}
MSL_FN bool simd_any(bool mine) {
  return _vote(mine).yes != 0;
}
MSL_FN bool simd_all(bool mine) {
  const _votes votes = _vote(mine);
  return votes.yes == votes.active;
}
MSL_FN bool simd_is_first() {
  return uint(__builtin_ctz(_vote(true).yes)) == __msl_lane();
}
} // namespace metal
