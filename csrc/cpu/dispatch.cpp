#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sage {

namespace generic {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_vnni {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
#elif defined(__aarch64__)
namespace neon {
extern const KernelTable table;
}
namespace neon_dotprod {
extern const KernelTable table;
}
#endif

const KernelTable* kernel_table(int index) {
#if defined(__x86_64__)
  static const KernelTable* const tables[] = {&generic::table, &avx2::table, &avx512::table, &avx512_vnni::table,
                                              &avx512_bf16::table};
  return index >= 0 && index < 5 ? tables[index] : nullptr;
#elif defined(__aarch64__)
  static const KernelTable* const tables[] = {&generic::table, &neon::table, &neon_dotprod::table};
  return index >= 0 && index < 3 ? tables[index] : nullptr;
#else
  return index == 0 ? &generic::table : nullptr;
#endif
}

bool is_supported(int index) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (index == 1)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (index == 2) {
    return is_supported(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (index == 3) return is_supported(2) && __builtin_cpu_supports("avx512vnni");
  if (index == 4) return is_supported(3) && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (index == 1) return true;  // part of the architecture
#if defined(__APPLE__)
  if (index == 2) return true;  // every Apple core has it
#elif defined(__linux__)
  if (index == 2) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
#endif
  return index == 0;
}

}  // namespace sage
