// <metal_atomic>. The runtime does the operation: it is not a race, but a plain access beside it
// is.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed = 0 };
template <class T>
struct _atomic {
  T value;
};
template <class T>
using atomic = _atomic<T>;
typedef _atomic<int> _atomic_int;
typedef _atomic<uint> _atomic_uint;
typedef _atomic<float> _atomic_float;
typedef _atomic<bool> _atomic_bool;
typedef _atomic<ulong> _atomic_ulong;
// OpenCL C has types of these names.
#define atomic_int _atomic_int
#define atomic_uint _atomic_uint
#define atomic_float _atomic_float
#define atomic_bool _atomic_bool
#define atomic_ulong _atomic_ulong

enum _atomic_op : uint {
  _atomic_load,
  _atomic_store,
  _atomic_exchange,
  _atomic_compare,
  _atomic_add,
  _atomic_sub,
  _atomic_add_float,
  _atomic_and,
  _atomic_or,
  _atomic_xor,
  _atomic_min_signed,
  _atomic_max_signed,
  _atomic_min_unsigned,
  _atomic_max_unsigned
};

template <class T>
MSL_FN ulong _to_bits(T value) {
  if constexpr (sizeof(T) == 8) {
    return as_type<ulong>(value);
  } else if constexpr (sizeof(T) == 4) {
    return as_type<uint>(value);
  } else {
    return value;
  }
}
template <class T>
MSL_FN T _from_bits(ulong bits) {
  if constexpr (sizeof(T) == 8) {
    return as_type<T>(bits);
  } else if constexpr (sizeof(T) == 4) {
    return as_type<T>(uint(bits));
  } else {
    return T(bits);
  }
}

#define MSL_ATOMIC_FETCH(SPACE, name, op)                                                    \
  template <class T, class U>                                                                \
  MSL_FN T atomic_##name##_explicit(volatile SPACE _atomic<T>* p, U operand, memory_order) { \
    return _from_bits<T>(__msl_atomic(&p->value, sizeof(T), op, _to_bits(T(operand)), 0));   \
  }
#define MSL_ATOMIC(SPACE)                                                                        \
  MSL_ATOMIC_FETCH(SPACE, exchange, _atomic_exchange)                                            \
  MSL_ATOMIC_FETCH(SPACE, fetch_add, __is_same(T, float) ? _atomic_add_float : _atomic_add)      \
  MSL_ATOMIC_FETCH(SPACE, fetch_sub, _atomic_sub)                                                \
  MSL_ATOMIC_FETCH(SPACE, fetch_and, _atomic_and)                                                \
  MSL_ATOMIC_FETCH(SPACE, fetch_or, _atomic_or)                                                  \
  MSL_ATOMIC_FETCH(SPACE, fetch_xor, _atomic_xor)                                                \
  MSL_ATOMIC_FETCH(SPACE, fetch_min, is_signed_v<T> ? _atomic_min_signed : _atomic_min_unsigned) \
  MSL_ATOMIC_FETCH(SPACE, fetch_max, is_signed_v<T> ? _atomic_max_signed : _atomic_max_unsigned) \
  template <class T>                                                                             \
  MSL_FN T atomic_load_explicit(const volatile SPACE _atomic<T>* p, memory_order) {              \
    return _from_bits<T>(__msl_atomic(&p->value, sizeof(T), _atomic_load, 0, 0));                \
  }                                                                                              \
  template <class T, class U>                                                                    \
  MSL_FN void atomic_store_explicit(volatile SPACE _atomic<T>* p, U operand, memory_order) {     \
    __msl_atomic(&p->value, sizeof(T), _atomic_store, _to_bits(T(operand)), 0);                  \
  }                                                                                              \
  template <class T, class U>                                                                    \
  MSL_FN bool atomic_compare_exchange_weak_explicit(                                             \
      volatile SPACE _atomic<T>* p, thread T* expected, U desired, memory_order, memory_order) { \
    const ulong wanted = _to_bits(*expected);                                                    \
    const ulong found =                                                                          \
        __msl_atomic(&p->value, sizeof(T), _atomic_compare, _to_bits(T(desired)), wanted);       \
    *expected = _from_bits<T>(found);                                                            \
    return found == wanted;                                                                      \
  }
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)
#undef MSL_ATOMIC
#undef MSL_ATOMIC_FETCH
} // namespace metal
