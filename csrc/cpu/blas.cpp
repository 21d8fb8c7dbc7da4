// A fast sgemm under the standard name.
//
// MLX's Linux CPU wheel is linked to the reference BLAS, a scalar loop on one core, and its
// float32 matmuls (attention, for one) call cblas_sgemm. Loaded with RTLD_GLOBAL, this library
// answers that call instead, as preloading OpenBLAS would. A BLAS preloaded by the user comes
// first in the search order and wins.
#include "types.h"

extern "C" OPTIQ_API void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k,
    float alpha, const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  constexpr int kColMajor = 102, kNoTrans = 111;
  bool ta = trans_a != kNoTrans, tb = trans_b != kNoTrans;
  if (m <= 0 || n <= 0) {
    return;
  }
  if (order == kColMajor) { // C^T = op(B)^T op(A)^T in row-major terms
    optiq::cpu::kernels().sgemm({n, m, k, b, a, c, ldb, lda, ldc, tb, ta, alpha, beta});
  } else {
    optiq::cpu::kernels().sgemm({m, n, k, a, b, c, lda, ldb, ldc, ta, tb, alpha, beta});
  }
}
