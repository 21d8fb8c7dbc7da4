// What the kernels of low_rank.metal are told. Read by Metal and by C++ (csrc/launch).
#pragma once

struct LowRankShape {
  int in, out; // columns of x and of the result
  int rank;    // of all terms, a multiple of 8
  int slots;   // terms; slot 0 is none
};
