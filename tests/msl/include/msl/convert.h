// Value construction (float4(half4), float4(float2, 1, 2), ...), static_cast and as_type.
//
// OpenCL C++ has no functional cast with several arguments, and its int4(float4) reinterprets the
// bits without a word. So every construction of a vector comes here.
#pragma once

namespace metal {
template <class D, class S>
MSL_FN constexpr D _convert(S s) {
  if constexpr (is_vector_v<D> && is_vector_v<S>) {
    static_assert(_vector<D>::count == _vector<S>::count, "vector sizes differ");
    if constexpr (__is_same(D, S)) {
      return s;
    } else {
      return __builtin_convertvector(s, D);
    }
  } else if constexpr (is_vector_v<D>) {
    return D(vec_elem_t<D>(s));
  } else {
    return D(s);
  }
}

template <class D, int I>
MSL_FN constexpr void _fill(thread D&) {
  static_assert(I == _vector<D>::count || I == 1, "wrong number of vector components");
}
template <class D, int I, class S, class... R>
MSL_FN constexpr void _fill(thread D& d, S s, R... rest) {
  if constexpr (is_vector_v<S>) {
    for (int i = 0; i < _vector<S>::count; i++) {
      d[I + i] = vec_elem_t<D>(s[i]);
    }
    _fill<D, I + _vector<S>::count>(d, rest...);
  } else {
    d[I] = vec_elem_t<D>(s);
    _fill<D, I + 1>(d, rest...);
  }
}

template <class D>
MSL_FN constexpr D _make() {
  return D(0);
}
template <class D, class S>
MSL_FN constexpr D _make(S s) {
  return _convert<D>(s);
}
template <class D, class S, class... R>
MSL_FN constexpr enable_if_t<sizeof...(R) != 0, D> _make(S s, R... rest) {
  D d = D(0);
  _fill<D, 0>(d, s, rest...);
  return d;
}

// Metal's static_cast also takes half to bfloat and vector to vector.
template <class D, class S>
MSL_FN constexpr D _static_cast(S s) {
  if constexpr (is_floating_point_v<D> && is_floating_point_v<S> && sizeof(D) == 2) {
    return D(float(s));
  } else if constexpr (is_vector_v<D>) {
    return _convert<D>(s);
  } else {
    return static_cast<D>(s);
  }
}

// pointer += integral_constant: clang has no built-in candidate for pointers with a space.
} // namespace metal

#define MSL_POINTER_STEP(SPACE)                                           \
  template <class T, class C>                                             \
  MSL_FN metal::enable_if_t<__is_class(C), SPACE T * thread&> operator+=( \
      SPACE T * thread & p, C c) {                                        \
    p = p + (long)c;                                                      \
    return p;                                                             \
  }                                                                       \
  template <class T, class C>                                             \
  MSL_FN metal::enable_if_t<__is_class(C), SPACE T * thread&> operator-=( \
      SPACE T * thread & p, C c) {                                        \
    p = p - (long)c;                                                      \
    return p;                                                             \
  }
MSL_POINTER_STEP(device)
MSL_POINTER_STEP(threadgroup)
#undef MSL_POINTER_STEP

template <class D, class S>
MSL_FN constexpr D as_type(S s) {
  static_assert(sizeof(D) == sizeof(S), "as_type: sizes differ");
  return __builtin_bit_cast(D, s);
}
