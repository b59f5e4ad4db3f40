// What sweeps over a row are made of: vectorised exp, tanh and log, the way from a
// product to a logit, the statistics of a row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/isa.h"
#include "rows.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace drift {
namespace {  // each file that includes this has its own copy, inlined into its sweeps

// Sweeps are compiled for AVX-512, AVX2 and the baseline, and chosen once by what the CPU has (target_clones
// would go by its maker: arch=haswell is not chosen on an AMD one). Keep OpenMP regions outside: an outlined
// body has the baseline's instructions.
#if defined(__x86_64__)
#define DRIFT_AVX2 __attribute__((target("avx2,fma")))
#define DRIFT_AVX512 \
  __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

constexpr int64_t BLOCK = 2048;  // elements between two folds into double: keeps fp32 sums exact to a few ulp

// exp to 2 ulp, branch-free so that it vectorises; 0 below -87, NaN stays NaN. After Cephes (S. Moshier).
ALWAYS_INLINE float fast_exp(float x) {
  const float c = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::floor(c * 1.44269504f + 0.5f);
  float r = c - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  const float e = p * scale;
  return x < -87.0f ? 0.0f : e;
}
ALWAYS_INLINE double fast_exp(double x) { return std::exp(x); }

// tanh to a few ulp: the exponential form cancels near 0, where a polynomial takes over.
ALWAYS_INLINE float fast_tanh(float a) {
  const float s = a * a;
  const float small =
      a * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
  const float large = 1.0f - 2.0f / (fast_exp(2.0f * a) + 1.0f);
  return s < 0.0625f ? small : large;
}
ALWAYS_INLINE double fast_tanh(double a) { return std::tanh(a); }

// log to 2 ulp of a positive normal number; NaN gives anything, so let it reach
// the result another way. After Cephes.
ALWAYS_INLINE float fast_log(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of x = m * 2^exponent, m in [sqrt(1/2), sqrt(2))
  bits -= exponent * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float f = m - 1.0f, square = f * f, n = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * square + n * -2.12194440e-4f - 0.5f * square) + n * 0.693359375f;
}
ALWAYS_INLINE double fast_log(double x) { return std::log(x); }

template <class R>
struct Transform {  // x -> z, and dz/dx from z
  R logit_scale, softcap, inv_temperature;
  const R* bias;
  ALWAYS_INLINE bool identity() const {
    return !bias && softcap == 0 && logit_scale == 1 && inv_temperature == 1;
  }
  ALWAYS_INLINE R apply(R x, int64_t j) const {
    R u = logit_scale * (bias ? x + bias[j] : x);
    if (softcap != 0) u = softcap * fast_tanh(u / softcap);
    return u * inv_temperature;
  }
  ALWAYS_INLINE R slope(R z) const {
    R s = logit_scale * inv_temperature;
    if (softcap != 0) {
      const R t = z / (inv_temperature * softcap);
      s *= R(1) - t * t;
    }
    return s;
  }
};

template <class R, bool BIAS, bool CAPPED>
ALWAYS_INLINE void transform_block(R* __restrict x, int64_t n, const R* __restrict bias, R scale, R cap,
                                   R inverse) {
  const R per_cap = R(1) / (CAPPED ? cap : R(1));
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    R u = scale * (BIAS ? x[i] + bias[i] : x[i]);
    if (CAPPED) u = cap * fast_tanh(u * per_cap);
    x[i] = u * inverse;
  }
}

template <class R>
ALWAYS_INLINE void transform_any(R* x, int64_t n, int64_t first, const Transform<R>& t) {
  const R* b = t.bias ? t.bias + first : nullptr;
  const R s = t.logit_scale, c = t.softcap, i = t.inv_temperature;
  if (b)
    c != 0 ? transform_block<R, true, true>(x, n, b, s, c, i)
           : transform_block<R, true, false>(x, n, b, s, c, i);
  else
    c != 0 ? transform_block<R, false, true>(x, n, b, s, c, i)
           : transform_block<R, false, false>(x, n, b, s, c, i);
}

template <class R>
struct RowStats {
  R max;
  Lse<R> lse;
  R entropy, mean, log_sum_sq;
};

// One sweep: blocks are transformed, and a running maximum rescales the sums (online softmax).
template <class R>
ALWAYS_INLINE RowStats<R> stats_sweep(R* __restrict z, int64_t V, const Transform<R>& t, bool extra) {
  const bool identity = t.identity();
  const R NEG = -std::numeric_limits<R>::infinity();
  R m = NEG;
  double s0 = 0, s1 = 0, s2 = 0, sz = 0;  // sums of e, e*(z - m), e*e, z with e = exp(z - m)
  for (int64_t b = 0; b < V; b += BLOCK) {
    const int64_t n = std::min(BLOCK, V - b);
    R* __restrict x = z + b;
    if (!identity) transform_any(x, n, b, t);
    R bm = NEG;
#pragma omp simd reduction(max : bm)
    for (int64_t i = 0; i < n; i++) bm = x[i] > bm ? x[i] : bm;
    if (bm > m) {
      if (s0 != 0) {
        const double shift = double(m) - double(bm), k = std::exp(shift);
        s1 = k * (s1 + shift * s0);
        s0 *= k;
        s2 *= k * k;
      }
      m = bm;
    }
    if (m == NEG) {  // nothing but -inf so far, unless a NaN hides there
      for (int64_t i = 0; i < n; i++)
        if (x[i] != x[i]) s0 = x[i];
      sz += NEG;
      continue;
    }
    R a0 = 0, a1 = 0;
#pragma omp simd reduction(+ : a0, a1)
    for (int64_t i = 0; i < n; i++) {
      const R d = x[i] - m, e = fast_exp(d);
      a0 += e;
      a1 += e != 0 ? e * d : R(0);
    }
    s0 += a0;
    s1 += a1;
    if (extra) {
      R a2 = 0, az = 0;
#pragma omp simd reduction(+ : a2, az)
      for (int64_t i = 0; i < n; i++) {
        const R e = fast_exp(x[i] - m);
        a2 += e * e;
        az += x[i];
      }
      s2 += a2;
      sz += az;
    }
  }
  const double log_s0 = std::log(s0);
  return {m, Lse<R>::of(m, log_s0), R(log_s0 - s1 / s0), R(sz / V), R(std::log(s2) - 2 * log_s0)};
}

template <class R>
Transform<R> transform_of(const Rows& rows, int64_t i) {
  const R inv =
      rows.inv_temperature ? static_cast<const R*>(rows.inv_temperature)[i] : R(rows.scalar_inv_temperature);
  return {R(rows.logit_scale), R(rows.softcap), inv, static_cast<const R*>(rows.bias)};
}

template <class R>
R* row_of(const Rows& rows, int64_t i) { return static_cast<R*>(rows.logits) + i * rows.stride; }

struct Span { int64_t begin, end; };
inline Span entries_of(const Rows& rows, int64_t i) {
  return rows.row_ptr ? Span{rows.row_ptr[i], rows.row_ptr[i + 1]} : Span{i, i + 1};
}

template <class R>
R at(const void* p, int64_t i, R otherwise) { return p ? static_cast<const R*>(p)[i] : otherwise; }
template <class R>
void put(void* p, int64_t i, R v) { if (p) static_cast<R*>(p)[i] = v; }

}  // namespace
}  // namespace drift
