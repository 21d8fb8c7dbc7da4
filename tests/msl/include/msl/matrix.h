// <metal_simdgroup_matrix>: an 8x8 matrix is spread over 32 lanes, two neighbours of a row a lane,
// in the layout that Apple's GPUs use and that MLX relies on through thread_elements().
#pragma once

namespace metal {
MSL_FN uint _matrix_row(uint lane) {
  return ((lane >> 2) & 4) + ((lane >> 1) & 3);
}
MSL_FN uint _matrix_column(uint lane) {
  return ((lane >> 1) & 4) + (lane & 1) * 2;
}

template <class T, int R = 8, int C = 8>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8x8");
  typedef vec<T, 2> storage_type;
  storage_type t;
  MSL_FN simdgroup_matrix() {}
  MSL_FN explicit simdgroup_matrix(T diagonal) {
    const uint row = _matrix_row(__msl_lane()), column = _matrix_column(__msl_lane());
    t[0] = row == column ? diagonal : T(0);
    t[1] = row == column + 1 ? diagonal : T(0);
  }
  MSL_FN thread storage_type& thread_elements() thread {
    return t;
  }
  MSL_FN const thread storage_type& thread_elements() const thread {
    return t;
  }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;

template <class T, int R, int C>
MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.t = vec<T, 2>(value);
  return m;
}

// `stride` is in elements and `origin` is (column, row), as in Metal.
#define MSL_MATRIX_MEMORY(SPACE)                                                                   \
  template <class T>                                                                               \
  MSL_FN void simdgroup_load(thread simdgroup_matrix<T>& m, const SPACE T* from, ulong stride = 8, \
      ulong2 origin = ulong2(0), bool transpose = false) {                                         \
    const uint row = _matrix_row(__msl_lane()), column = _matrix_column(__msl_lane());             \
    for (uint j = 0; j < 2; j++) {                                                                 \
      const ulong y = transpose ? column + j : row, x = transpose ? row : column + j;              \
      m.t[j] = from[(origin.y + y) * stride + origin.x + x];                                       \
    }                                                                                              \
  }                                                                                                \
  template <class T>                                                                               \
  MSL_FN void simdgroup_store(simdgroup_matrix<T> m, SPACE T* to, ulong stride = 8,                \
      ulong2 origin = ulong2(0), bool transpose = false) {                                         \
    const uint row = _matrix_row(__msl_lane()), column = _matrix_column(__msl_lane());             \
    for (uint j = 0; j < 2; j++) {                                                                 \
      const ulong y = transpose ? column + j : row, x = transpose ? row : column + j;              \
      to[(origin.y + y) * stride + origin.x + x] = m.t[j];                                         \
    }                                                                                              \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
#undef MSL_MATRIX_MEMORY

// d = a b + c, in float32, rounded once to the type of d.
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D>& d,
    thread const simdgroup_matrix<A>& a, thread const simdgroup_matrix<B>& b,
    thread const simdgroup_matrix<C>& c) {
  float six[6] = {
      float(a.t[0]), float(a.t[1]), float(b.t[0]), float(b.t[1]), float(c.t[0]), float(c.t[1])};
  __msl_multiply(six);
  d.t[0] = D(six[0]);
  d.t[1] = D(six[1]);
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<D>& d, thread const simdgroup_matrix<A>& a,
    thread const simdgroup_matrix<B>& b) {
  simdgroup_matrix<D> zero;
  zero.t = vec<D, 2>(0);
  simdgroup_multiply_accumulate(d, a, b, zero);
}
} // namespace metal
