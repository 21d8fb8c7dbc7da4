// What the kernels of quantize.metal are told. Read by Metal and by C++ (csrc/launch).
#pragma once

struct QuantizeShape {
  unsigned int octets; // runs of eight weights
  unsigned int cols;
  unsigned int rows_per_importance;
};
