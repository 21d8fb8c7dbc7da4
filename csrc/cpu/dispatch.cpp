#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "types.h"

#ifdef OPTIQ_WITH_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace amx {
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

// 512-bit kernels are for processors that also multiply 16-bit integers with them.
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef OPTIQ_WITH_AMX
// Linux saves the tiles of threads whose process has asked for it.
bool runs_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18; // asm/prctl.h, of Linux 5.16
  unsigned a, b, c, d;
  bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bit_AMX_BF16) && (d & bit_AMX_TILE) &&
             __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
  return has && runs_avx512() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

} // namespace

// CMakeLists.txt says which were compiled.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef OPTIQ_WITH_AMX
  if (runs_amx()) {
    usable.push_back(&amx::table);
  }
#endif
#ifdef OPTIQ_WITH_AVX512
  if (runs_avx512()) {
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
