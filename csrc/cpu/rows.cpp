// Row kernels for a CPU. One thread takes one row; a row (0.6 MB at V =
// 151,936) stays in its L2 between sweeps.
#include <vector>

#include "cpu/sweeps.h"

namespace drift {
namespace {

// z (or, raw, the products) become -(P p + E p (log p + H)) times dz/dx; the
// targets' own terms are added by the caller.
template <class R, bool CAPPED, bool ENTROPY>
ALWAYS_INLINE void grad_sweep(R* __restrict z, int64_t V, const Transform<R>& t, bool raw, Lse<R> lse, R P,
                              R E, R H) {
  const R flat = t.logit_scale * t.inv_temperature,
          per_cap = CAPPED ? R(1) / (t.inv_temperature * t.softcap) : R(0);
  const R minus_p = -P * flat, minus_e = -E * flat;
  for (int64_t b = 0; b < V; b += BLOCK) {
    const int64_t n = std::min(BLOCK, V - b);
    R* __restrict x = z + b;
    if (raw) transform_any(x, n, b, t);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const R v = x[i], lp = lse.log_prob(v), p = fast_exp(lp);
      R g = minus_p * p;
      if (ENTROPY) g += p != 0 ? minus_e * p * (lp + H) : R(0);
      if (CAPPED) g *= R(1) - v * per_cap * v * per_cap;
      x[i] = g;
    }
  }
}

template <class R>
ALWAYS_INLINE void grad_any(R* z, int64_t V, const Transform<R>& t, bool raw, Lse<R> lse, R P, R E, R H) {
  raw = raw && !t.identity();
  if (t.softcap != 0)
    E != 0 ? grad_sweep<R, true, true>(z, V, t, raw, lse, P, E, H)
           : grad_sweep<R, true, false>(z, V, t, raw, lse, P, E, H);
  else
    E != 0 ? grad_sweep<R, false, true>(z, V, t, raw, lse, P, E, H)
           : grad_sweep<R, false, false>(z, V, t, raw, lse, P, E, H);
}

// The two sweeps, compiled once for each instruction set.
template <class R>
struct Sweeps {
  RowStats<R> (*stats)(R*, int64_t, const Transform<R>&, bool);
  void (*grad)(R*, int64_t, const Transform<R>&, bool, Lse<R>, R, R, R);
};

#define SWEEPS(NAME, TARGET)                                                                               \
  template <class R>                                                                                       \
  struct NAME {                                                                                            \
    TARGET static RowStats<R> stats(R* z, int64_t V, const Transform<R>& t, bool extra) {                  \
      return stats_sweep(z, V, t, extra);                                                                  \
    }                                                                                                      \
    TARGET static void grad(R* z, int64_t V, const Transform<R>& t, bool raw, Lse<R> lse, R P, R E, R H) { \
      grad_any(z, V, t, raw, lse, P, E, H);                                                                \
    }                                                                                                      \
  };

SWEEPS(Baseline, )
#if defined(__x86_64__)
SWEEPS(Avx2, DRIFT_AVX2)
SWEEPS(Avx512, DRIFT_AVX512)
#endif

template <class R>
Sweeps<R> sweeps() {
#if defined(__x86_64__)
  if (simd() == Simd::avx512) return {Avx512<R>::stats, Avx512<R>::grad};
  if (simd() == Simd::avx2) return {Avx2<R>::stats, Avx2<R>::grad};
#endif
  return {Baseline<R>::stats, Baseline<R>::grad};
}

template <class R>
RowStats<R> measure(const Rows& rows, const Stats& stats, int64_t i) {
  R* z = row_of<R>(rows, i);
  const auto s =
      sweeps<R>().stats(z, rows.vocab, transform_of<R>(rows, i), stats.mean_logits || stats.log_sum_sq);
  put<R>(stats.lse, i, s.lse.high);
  put<R>(stats.lse_low, i, s.lse.low);
  put<R>(stats.entropy, i, s.entropy);
  put<R>(stats.mean_logits, i, s.mean);
  put<R>(stats.log_sum_sq, i, s.log_sum_sq);
  const Span e = entries_of(rows, i);
  for (int64_t k = e.begin; k < e.end; k++) {
    const int64_t y = rows.targets[k];
    put<R>(stats.logprobs, k, y < 0 ? R(0) : s.lse.at_most_0(z[y]));
    put<R>(stats.top1, k, y >= 0 && z[y] >= s.max ? R(1) : R(0));
  }
  return s;
}

// dlogits of one row from its coefficients; returns false, and leaves the row, where
// all are zero. `coef(k)` is entry k's.
template <class R, class F>
bool differentiate(const Rows& rows, int64_t i, bool raw, Lse<R> lse, R extra, R E, R H, F coef) {
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
    const R v = raw ? t.apply(z[y], y) : z[y], lp = lse.log_prob(v), p = fast_exp(lp), slope = t.slope(v);
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

template <class R>
void row_stats(const Rows& rows, const Stats& stats) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) measure<R>(rows, stats, i);
}

template <class R>
void grad_logits(const Rows& rows, const Coefs& coefs, bool raw, uint8_t* live) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    const Lse<R> lse{at<R>(coefs.lse, i, R(0)), at<R>(coefs.lse_low, i, R(0))};
    const R E = at<R>(coefs.entropy, i, R(0)), H = at<R>(coefs.row_entropy, i, R(0));
    live[i] = differentiate<R>(rows, i, raw, lse, -at<R>(coefs.row_lse, i, R(0)), E, H,
                               [&](int64_t k) { return at<R>(coefs.logprobs, k, R(0)); });
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
      const R logp = s.lse.at_most_0(z[y]), w = at<R>(policy.weights, k, R(1));
      const auto token = policy_token<R>(p, logp, at<R>(policy.advantages, k, R(1)), policy.old,
                                         at<R>(policy.old, k, R(0)), policy.ref, at<R>(policy.ref, k, R(0)));
      R loss = token.loss;
      if (p.entropy_coef != 0) loss -= R(p.entropy_coef) * s.entropy;
      if (p.z_loss_coef != 0) loss += R(p.z_loss_coef) * s.lse.high * s.lse.high;
      put<R>(policy.loss, k, w != 0 ? w * loss : R(0));
      put<R>(policy.ratio, k, token.ratio);
      put<R>(policy.kl, k, token.kl);
      put<R>(policy.clipped, k, w != 0 ? token.clipped : R(0));
      coef[k] = w != 0 ? w * token.dlogp : R(0);
      weight_sum += w;
    }
    if (!policy.gradient) continue;
    const R E = -R(p.entropy_coef) * weight_sum, extra = -R(2 * p.z_loss_coef) * weight_sum * s.lse.high;
    live[i] =
        differentiate<R>(rows, i, false, s.lse, extra, E, s.entropy, [&](int64_t k) { return coef[k]; });
  }
}

int64_t compact(void* logits, int64_t rows, int64_t row_bytes, int64_t stride_bytes, const uint8_t* live,
                int64_t* order) {
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
  for (int64_t k = 0; k < n; k++)
    std::memcpy(base + moves[k].end * stride_bytes, base + moves[k].begin * stride_bytes, row_bytes);
  return count;
}

template void row_stats<float>(const Rows&, const Stats&);
template void row_stats<double>(const Rows&, const Stats&);
template void grad_logits<float>(const Rows&, const Coefs&, bool, uint8_t*);
template void grad_logits<double>(const Rows&, const Coefs&, bool, uint8_t*);
template void fused_policy<float>(const Rows&, const Stats&, const Policy&, uint8_t*);
template void fused_policy<double>(const Rows&, const Stats&, const Policy&, uint8_t*);

}  // namespace drift
