#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace drift {
namespace {

constexpr const char* NAMES[] = {"baseline", "avx2", "avx512"};

// By what the CPU has: target_clones would go by its maker (arch=haswell is not chosen on an AMD one).
Simd best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::avx2;
#endif
  return Simd::baseline;
}

std::atomic<Simd>& chosen() {
  static std::atomic<Simd> isa{best()};
  return isa;
}

}  // namespace

Simd simd() { return chosen().load(std::memory_order_relaxed); }

std::vector<std::string> row_isas() { return {NAMES, NAMES + static_cast<int>(best()) + 1}; }

void limit_row_isa(const std::string& name) {
  for (int isa = 0; isa <= static_cast<int>(best()); isa++)
    if (name == NAMES[isa]) return chosen().store(static_cast<Simd>(isa));
  throw std::invalid_argument("limit_isa: this CPU has no '" + name + "'; see isas()");
}

}  // namespace drift
