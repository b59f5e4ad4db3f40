// half as bits, rounded to nearest even; overflow gives infinity.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half { uint16_t bits; };

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (x != x) return {0x7fff};
  if (a >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int e;
  std::frexp(a, &e);
  const int exponent = e < -13 ? -13 : e;                       // below, numbers are subnormal
  const float units = std::nearbyint(std::ldexp(a, 11 - exponent));  // of the last place; 2048 carries into the exponent
  if (units < 1024) return {uint16_t(sign | uint16_t(units))};
  return {uint16_t(sign | (uint16_t(exponent + 14) << 10) + uint16_t(units - 1024))};
}
