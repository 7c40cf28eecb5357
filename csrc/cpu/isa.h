// Which instruction set's kernels run.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace diffmf::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that this machine has, or DIFFMF_CPU_CAPABILITY if that is less.
inline Isa choose_isa() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // F16C came before AVX2; not every compiler knows its name here.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* limit = std::getenv("DIFFMF_CPU_CAPABILITY");
  if (!limit) return best;
  const std::string name = limit;
  if (name == "baseline") return Isa::baseline;
  if (name == "avx2") return std::min(best, Isa::avx2);
  if (name == "avx512") return best;
  throw std::invalid_argument("DIFFMF_CPU_CAPABILITY is '" + name + "', expected baseline, avx2 or avx512");
}

// Returns `table` of the namespace of the chosen instruction set.
#if defined(__x86_64__)
#define DIFFMF_SELECT(table)           \
  static const Isa isa = choose_isa(); \
  return isa == Isa::avx512 ? avx512::table : isa == Isa::avx2 ? avx2::table : baseline::table;
#else
#define DIFFMF_SELECT(table)           \
  static const Isa isa = choose_isa(); \
  (void)isa;                           \
  return baseline::table;
#endif

}  // namespace diffmf::cpu
