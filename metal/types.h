// Float types of the outputs.
#pragma once

#include <metal_stdlib>
using namespace metal;

// The wider of two types, as mx.result_type: float where float16 and bfloat16 meet.
template <typename A, typename B>
struct Wider {
  typedef float type;
};
template <typename A>
struct Wider<A, A> {
  typedef A type;
};
