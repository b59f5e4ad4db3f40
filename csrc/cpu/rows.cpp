// Row kernels for a CPU. One thread takes one row; a row (0.6 MB at V = 151,936) stays in its L2 between sweeps.
//
// The sweeps are compiled for AVX-512, AVX2 and the baseline, and chosen once by what the CPU has (target_clones would go by
// its maker: arch=haswell is not chosen on an AMD one). The OpenMP region stays outside, since an outlined body keeps the
// baseline's instructions.
#include "rows.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace drift {
namespace {

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
  const float small = a * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
  const float large = 1.0f - 2.0f / (fast_exp(2.0f * a) + 1.0f);
  return s < 0.0625f ? small : large;
}
ALWAYS_INLINE double fast_tanh(double a) { return std::tanh(a); }

template <class R>
struct Transform {  // x -> z, and dz/dx from z
  R logit_scale, softcap, inv_temperature;
  const R* bias;
  ALWAYS_INLINE bool identity() const { return !bias && softcap == 0 && logit_scale == 1 && inv_temperature == 1; }
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
ALWAYS_INLINE void transform_block(R* __restrict x, int64_t n, const R* __restrict bias, R scale, R cap, R inverse) {
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
  if (b) c != 0 ? transform_block<R, true, true>(x, n, b, s, c, i) : transform_block<R, true, false>(x, n, b, s, c, i);
  else c != 0 ? transform_block<R, false, true>(x, n, b, s, c, i) : transform_block<R, false, false>(x, n, b, s, c, i);
}

template <class R>
struct RowStats {
  R max, lse, entropy, mean, log_sum_sq;
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
  return {m, R(double(m) + log_s0), R(log_s0 - s1 / s0), R(sz / V), R(std::log(s2) - 2 * log_s0)};
}

// z (or, raw, the products) become -(P p + E p (log p + H)) times dz/dx; the targets' own terms are added by the caller.
template <class R, bool CAPPED, bool ENTROPY>
ALWAYS_INLINE void grad_sweep(R* __restrict z, int64_t V, const Transform<R>& t, bool raw, R lse, R P, R E, R H) {
  const R flat = t.logit_scale * t.inv_temperature, per_cap = CAPPED ? R(1) / (t.inv_temperature * t.softcap) : R(0);
  const R minus_p = -P * flat, minus_e = -E * flat;
  for (int64_t b = 0; b < V; b += BLOCK) {
    const int64_t n = std::min(BLOCK, V - b);
    R* __restrict x = z + b;
    if (raw) transform_any(x, n, b, t);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const R v = x[i], lp = v - lse, p = fast_exp(lp);
      R g = minus_p * p;
      if (ENTROPY) g += p != 0 ? minus_e * p * (lp + H) : R(0);
      if (CAPPED) g *= R(1) - v * per_cap * v * per_cap;
      x[i] = g;
    }
  }
}

template <class R>
ALWAYS_INLINE void grad_any(R* z, int64_t V, const Transform<R>& t, bool raw, R lse, R P, R E, R H) {
  raw = raw && !t.identity();
  if (t.softcap != 0) E != 0 ? grad_sweep<R, true, true>(z, V, t, raw, lse, P, E, H) : grad_sweep<R, true, false>(z, V, t, raw, lse, P, E, H);
  else E != 0 ? grad_sweep<R, false, true>(z, V, t, raw, lse, P, E, H) : grad_sweep<R, false, false>(z, V, t, raw, lse, P, E, H);
}

// The two sweeps, compiled once for each instruction set.
template <class R>
struct Sweeps {
  RowStats<R> (*stats)(R*, int64_t, const Transform<R>&, bool);
  void (*grad)(R*, int64_t, const Transform<R>&, bool, R, R, R, R);
};

#define SWEEPS(NAME, TARGET)                                                                                          \
  template <class R>                                                                                                  \
  struct NAME {                                                                                                       \
    TARGET static RowStats<R> stats(R* z, int64_t V, const Transform<R>& t, bool extra) { return stats_sweep(z, V, t, extra); } \
    TARGET static void grad(R* z, int64_t V, const Transform<R>& t, bool raw, R lse, R P, R E, R H) {                  \
      grad_any(z, V, t, raw, lse, P, E, H);                                                                           \
    }                                                                                                                 \
  };

SWEEPS(Baseline, )
#if defined(__x86_64__)
SWEEPS(Avx2, __attribute__((target("avx2,fma"))))
SWEEPS(Avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512"))))
#endif

enum Isa { BASELINE, AVX2, AVX512 };
constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512"};

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return BASELINE;
}

std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> chosen{best_isa()};
  return chosen;
}

template <class R>
Sweeps<R> sweeps() {
#if defined(__x86_64__)
  switch (chosen_isa().load(std::memory_order_relaxed)) {
    case AVX512: return {Avx512<R>::stats, Avx512<R>::grad};
    case AVX2: return {Avx2<R>::stats, Avx2<R>::grad};
    case BASELINE: break;
  }
#endif
  return {Baseline<R>::stats, Baseline<R>::grad};
}

template <class R>
Transform<R> transform_of(const Rows& rows, int64_t i) {
  const R inv = rows.inv_temperature ? static_cast<const R*>(rows.inv_temperature)[i] : R(rows.scalar_inv_temperature);
  return {R(rows.logit_scale), R(rows.softcap), inv, static_cast<const R*>(rows.bias)};
}

template <class R>
R* row_of(const Rows& rows, int64_t i) { return static_cast<R*>(rows.logits) + i * rows.stride; }

struct Span { int64_t begin, end; };
Span entries_of(const Rows& rows, int64_t i) {
  return rows.row_ptr ? Span{rows.row_ptr[i], rows.row_ptr[i + 1]} : Span{i, i + 1};
}

template <class R>
R at(const void* p, int64_t i, R otherwise) { return p ? static_cast<const R*>(p)[i] : otherwise; }
template <class R>
void put(void* p, int64_t i, R v) { if (p) static_cast<R*>(p)[i] = v; }

template <class R>
RowStats<R> measure(const Rows& rows, const Stats& stats, int64_t i) {
  R* z = row_of<R>(rows, i);
  const auto s = sweeps<R>().stats(z, rows.vocab, transform_of<R>(rows, i), stats.mean_logits || stats.log_sum_sq);
  put<R>(stats.lse, i, s.lse);
  put<R>(stats.entropy, i, s.entropy);
  put<R>(stats.mean_logits, i, s.mean);
  put<R>(stats.log_sum_sq, i, s.log_sum_sq);
  const Span e = entries_of(rows, i);
  for (int64_t k = e.begin; k < e.end; k++) {
    const int64_t y = rows.targets[k];
    // log(sum) >= 0 holds in exact arithmetic; rounding must not make a probability above 1
    put<R>(stats.logprobs, k, y < 0 ? R(0) : (z[y] > s.lse ? R(0) : z[y] - s.lse));
    put<R>(stats.top1, k, y >= 0 && z[y] >= s.max ? R(1) : R(0));
  }
  return s;
}

// dlogits of one row from its coefficients; returns false, and leaves the row, where all are zero. `coef(k)` is entry k's.
template <class R, class F>
bool differentiate(const Rows& rows, int64_t i, bool raw, R lse, R extra, R E, R H, F coef) {
  const Span e = entries_of(rows, i);
  R P = extra;
  bool any = extra != 0 || E != 0;
  for (int64_t k = e.begin; k < e.end; k++) {
    if (rows.targets[k] < 0) continue;
    any |= coef(k) != 0;
    P += coef(k);
  }
  if (!any) return false;
  R* z = row_of<R>(rows, i);
  const auto t = transform_of<R>(rows, i);
  struct Target { R slope, rest; };  // dz/dx there, and all of the gradient but the target's own term
  Target small[8];
  std::vector<Target> large(e.end - e.begin > 8 ? e.end - e.begin : 0);
  Target* at_target = (large.empty() ? small : large.data()) - e.begin;
  for (int64_t k = e.begin; k < e.end; k++) {
    const int64_t y = rows.targets[k];
    if (y < 0) continue;
    const R v = raw ? t.apply(z[y], y) : z[y], lp = v - lse, p = fast_exp(lp), slope = t.slope(v);
    at_target[k] = {slope, slope * (-P * p - (E != 0 && p != 0 ? E * p * (lp + H) : R(0)))};
  }
  sweeps<R>().grad(z, rows.vocab, t, raw, lse, P, E, H);
  // the same arithmetic for both terms, so that they cancel exactly where p = 1
  for (int64_t k = e.begin; k < e.end; k++)
    if (rows.targets[k] >= 0) z[rows.targets[k]] = at_target[k].rest;
  for (int64_t k = e.begin; k < e.end; k++)
    if (rows.targets[k] >= 0) z[rows.targets[k]] += at_target[k].slope * coef(k);
  return true;
}

}  // namespace

std::vector<std::string> row_isas() {
  return {ISA_NAMES, ISA_NAMES + best_isa() + 1};
}

void limit_row_isa(const std::string& name) {
  for (int isa = BASELINE; isa <= best_isa(); isa++)
    if (name == ISA_NAMES[isa]) return chosen_isa().store(static_cast<Isa>(isa));
  throw std::invalid_argument("limit_isa: this CPU has no '" + name + "'; see isas()");
}

template <class R>
void row_stats(const Rows& rows, const Stats& stats) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) measure<R>(rows, stats, i);
}

template <class R>
void grad_logits(const Rows& rows, const Coefs& coefs, bool raw, uint8_t* live) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    const R lse = at<R>(coefs.lse, i, R(0)), E = at<R>(coefs.entropy, i, R(0)), H = at<R>(coefs.row_entropy, i, R(0));
    live[i] = differentiate<R>(rows, i, raw, lse, -at<R>(coefs.row_lse, i, R(0)), E, H, [&](int64_t k) { return at<R>(coefs.logprobs, k, R(0)); });
  }
}

template <class R>
void fused_policy(const Rows& rows, const Stats& stats, const Policy& policy, uint8_t* live) {
  const PolicyParams& p = policy.params;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    const auto s = measure<R>(rows, stats, i);
    const R* z = row_of<R>(rows, i);
    const Span e = entries_of(rows, i);
    R small[8];
    std::vector<R> large(e.end - e.begin > 8 ? e.end - e.begin : 0);
    R* coef = (large.empty() ? small : large.data()) - e.begin;
    R weight_sum = 0;
    for (int64_t k = e.begin; k < e.end; k++) {
      const int64_t y = rows.targets[k];
      coef[k] = 0;
      if (y < 0) {
        put<R>(policy.loss, k, R(0));
        put<R>(policy.ratio, k, R(0));
        put<R>(policy.kl, k, R(0));
        put<R>(policy.clipped, k, R(0));
        continue;
      }
      const R logp = z[y] > s.lse ? R(0) : z[y] - s.lse, w = at<R>(policy.weights, k, R(1));
      const auto token = policy_token<R>(p, logp, at<R>(policy.advantages, k, R(1)), policy.old, at<R>(policy.old, k, R(0)), policy.ref,
                                         at<R>(policy.ref, k, R(0)));
      R loss = token.loss;
      if (p.entropy_coef != 0) loss -= R(p.entropy_coef) * s.entropy;
      if (p.z_loss_coef != 0) loss += R(p.z_loss_coef) * s.lse * s.lse;
      put<R>(policy.loss, k, w != 0 ? w * loss : R(0));
      put<R>(policy.ratio, k, token.ratio);
      put<R>(policy.kl, k, token.kl);
      put<R>(policy.clipped, k, w != 0 ? token.clipped : R(0));
      coef[k] = w != 0 ? w * token.dlogp : R(0);
      weight_sum += w;
    }
    if (!policy.gradient) continue;
    const R E = -R(p.entropy_coef) * weight_sum, extra = -R(2 * p.z_loss_coef) * weight_sum * s.lse;
    live[i] = differentiate<R>(rows, i, false, s.lse, extra, E, s.entropy, [&](int64_t k) { return coef[k]; });
  }
}

int64_t compact(void* logits, int64_t rows, int64_t row_bytes, int64_t stride_bytes, const uint8_t* live, int64_t* order) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; i++) count += live[i] != 0;
  std::vector<Span> moves;  // {from, to}: a live row behind the cut fills a dead one before it
  int64_t from = rows;
  for (int64_t to = 0; to < count; to++) {
    order[to] = to;
    if (live[to]) continue;
    do from--;
    while (!live[from]);
    order[to] = from;
    moves.push_back({from, to});
  }
  char* base = static_cast<char*>(logits);
  const int64_t n = static_cast<int64_t>(moves.size());
#pragma omp parallel for
  for (int64_t k = 0; k < n; k++) std::memcpy(base + moves[k].end * stride_bytes, base + moves[k].begin * stride_bytes, row_bytes);
  return count;
}

template void row_stats<float>(const Rows&, const Stats&);
template void row_stats<double>(const Rows&, const Stats&);
template void grad_logits<float>(const Rows&, const Coefs&, bool, uint8_t*);
template void grad_logits<double>(const Rows&, const Coefs&, bool, uint8_t*);
template void fused_policy<float>(const Rows&, const Stats&, const Policy&, uint8_t*);
template void fused_policy<double>(const Rows&, const Stats&, const Policy&, uint8_t*);

}  // namespace drift
