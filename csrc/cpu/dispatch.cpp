#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "types.h"

namespace optiq::cpu {

namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}

namespace {

#ifdef __x86_64__
bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

} // namespace

// CMakeLists.txt says which were compiled.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef OPTIQ_WITH_AVX512
  // One set of 512-bit kernels, for the processors that also multiply 16-bit integers with it.
  if (runs_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    usable.push_back(&avx512::table);
  }
#endif
#ifdef OPTIQ_WITH_AVX2
  if (runs_avx2()) {
    usable.push_back(&avx2::table);
  }
#endif
#ifdef OPTIQ_WITH_NEON
  usable.push_back(&neon::table);
#endif
  usable.push_back(&scalar::table);
  return usable;
}

namespace {

const Kernels* choose() {
  auto usable = usable_kernels();
  const char* asked = std::getenv("OPTIQ_ISA");
  if (!asked || !*asked) {
    return usable[0];
  }
  std::string names;
  for (const Kernels* one : usable) {
    if (std::string_view(asked) == one->isa) {
      return one;
    }
    names += (names.empty() ? "" : ", ") + std::string(one->isa);
  }
  throw std::invalid_argument("OPTIQ_ISA is '" + std::string(asked) + "', but optiq can use " +
                              names + " here; set it to one of these, or unset it");
}

} // namespace

const Kernels& kernels() {
  static const Kernels* best = choose();
  return *best;
}

} // namespace optiq::cpu
