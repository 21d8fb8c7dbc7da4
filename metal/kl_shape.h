// What the kernels of kl_divergence.metal are told. Read by Metal and by C++ (csrc/launch).
#pragma once

struct KlShape {
  int tokens;
  int vocabulary;
  int splits; // ranges of the vocabulary, each a threadgroup of its own
  int d_p, d_q;
  int shift_p, shift_q; // log2 of the group size of a quantized head
  float soft_cap;       // 0: none
};

// What is known of one token after one range of the vocabulary, maxima removed from exponents.
struct KlPart {
  float p_max, q_max;
  float p_sum, q_sum;   // of e^p and e^q
  float dot;            // of e^p (p - q)
  int p_first, q_first; // where the maxima were seen first
  int finite;           // whether all logits were
};
