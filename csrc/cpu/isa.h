// Which instruction set the sweeps over a row take. They are compiled for AVX-512, AVX2 and the baseline.
#pragma once
#include <string>
#include <vector>

namespace drift {

enum class Simd { baseline, avx2, avx512 };

Simd simd();                                // the best that this CPU has, unless limited
std::vector<std::string> row_isas();        // names of those that it has, best last
// For tests: which of them every later call takes. Any thread may set it at any
// time: a row is swept by one or the other.
void limit_row_isa(const std::string& name);

}  // namespace drift
