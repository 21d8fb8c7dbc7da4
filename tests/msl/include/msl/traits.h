// <metal_type_traits>.
#pragma once

namespace metal {
template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const {
    return v;
  }
  constexpr T operator()() const {
    return v;
  }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

#define MSL_BINARY_TRAIT(name, builtin)          \
  template <class T, class U>                    \
  struct name : bool_constant<builtin(T, U)> {}; \
  template <class T, class U>                    \
  inline constexpr constant bool name##_v = builtin(T, U);
MSL_BINARY_TRAIT(is_same, __is_same)
MSL_BINARY_TRAIT(is_convertible, __is_convertible_to)
MSL_BINARY_TRAIT(is_base_of, __is_base_of)
#undef MSL_BINARY_TRAIT

#define MSL_UNARY_TRAIT(name, value)               \
  template <class T>                               \
  inline constexpr constant bool name##_v = value; \
  template <class T>                               \
  struct name : bool_constant<name##_v<T>> {};
MSL_UNARY_TRAIT(is_void, __is_void(T))
MSL_UNARY_TRAIT(is_integral, __is_integral(T))
MSL_UNARY_TRAIT(is_signed, __is_signed(T))
MSL_UNARY_TRAIT(is_unsigned, __is_unsigned(T))
MSL_UNARY_TRAIT(is_floating_point, __is_same(__remove_cv(T), float) ||
                                       __is_same(__remove_cv(T), half) ||
                                       __is_same(__remove_cv(T), bfloat))
MSL_UNARY_TRAIT(is_arithmetic, is_integral_v<T> || is_floating_point_v<T>)
#undef MSL_UNARY_TRAIT

#define MSL_TRANSFORM(name, expression) \
  template <class T>                    \
  struct name {                         \
    typedef expression type;            \
  };                                    \
  template <class T>                    \
  using name##_t = typename name<T>::type;
MSL_TRANSFORM(remove_cv, __remove_cv(T))
MSL_TRANSFORM(remove_const, __remove_const(T))
MSL_TRANSFORM(remove_reference, __remove_reference_t(T))
MSL_TRANSFORM(remove_pointer, __remove_pointer(T))
MSL_TRANSFORM(decay, __remove_cv(__remove_reference_t(T)))
MSL_TRANSFORM(add_const, const T)
MSL_TRANSFORM(make_signed, __make_signed(T))
MSL_TRANSFORM(make_unsigned, __make_unsigned(T))
#undef MSL_TRANSFORM

template <class T>
struct remove_addrspace {
  typedef T type;
};
#define MSL_REMOVE_SPACE(SPACE)            \
  template <class T>                       \
  struct remove_addrspace<SPACE T> {       \
    typedef T type;                        \
  };                                       \
  template <class T>                       \
  struct remove_addrspace<const SPACE T> { \
    typedef const T type;                  \
  };
MSL_REMOVE_SPACE(device)
MSL_REMOVE_SPACE(threadgroup)
MSL_REMOVE_SPACE(thread)
MSL_REMOVE_SPACE(constant)
#undef MSL_REMOVE_SPACE
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class... B>
struct _disjunction : false_type {};
template <class B, class... R>
struct _disjunction<B, R...> : bool_constant<bool(B::value) || _disjunction<R...>::value> {};
template <class... B>
struct _conjunction : true_type {};
template <class B, class... R>
struct _conjunction<B, R...> : bool_constant<bool(B::value) && _conjunction<R...>::value> {};

template <class T>
T&& declval();
template <class T>
using uniform = T;
template <class T>
MSL_FN constexpr T make_uniform(T v) {
  return v;
}

// Element type and count of a vector; a scalar has count 0.
template <class V>
struct _vector {
  typedef V element;
  static constexpr constant int count = 0;
};
#define MSL_VECTOR_TRAIT(N)                  \
  template <class T>                         \
  struct _vector<vec<T, N>> {                \
    typedef T element;                       \
    static constexpr constant int count = N; \
  };
MSL_VECTOR_TRAIT(2)
MSL_VECTOR_TRAIT(3)
MSL_VECTOR_TRAIT(4)
#undef MSL_VECTOR_TRAIT
template <class V>
inline constexpr constant bool is_vector_v = _vector<V>::count != 0;
template <class V>
using vec_elem_t = typename _vector<V>::element;

template <class T, ulong N>
struct array {
  T __e[N];
  constexpr thread T& operator[](ulong i) thread {
    return __e[i];
  }
  constexpr T operator[](ulong i) const {
    return __e[i];
  }
  constexpr ulong size() const {
    return N;
  }
};
} // namespace metal
