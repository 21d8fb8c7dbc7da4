#include <cstdlib>
#include <cstring>

#include "types.h"

namespace optiq::cpu {

namespace scalar {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif

namespace {

const Kernels* choose() {
  const Kernels* usable[3];
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2_ok = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c");
  // One set of 512-bit kernels, for the processors that also multiply 16-bit integers with it.
  if (avx2_ok && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    usable[n++] = &avx512::table;
  }
  if (avx2_ok) {
    usable[n++] = &avx2::table;
  }
#elif defined(__aarch64__)
  usable[n++] = &neon::table;
#endif
  usable[n++] = &scalar::table;
  if (const char* asked = std::getenv("OPTIQ_ISA")) {
    for (int i = 0; i < n; i++) {
      if (std::strcmp(asked, usable[i]->isa) == 0) {
        return usable[i];
      }
    }
  }
  return usable[0];
}

} // namespace

const Kernels& kernels() {
  static const Kernels* best = choose();
  return *best;
}

} // namespace optiq::cpu
