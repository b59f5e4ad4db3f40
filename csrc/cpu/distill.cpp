// Row kernels of distillation for a CPU: divergences of two rows of logits and their gradient, top-k and what
// remains. One thread takes one row, or a pair of rows.
#include <utility>
#include <vector>

#include "cpu/sweeps.h"
#include "divergence.h"

namespace drift {
namespace {

struct Fast {  // the exp and log that vectorise
  template <class R>
  static ALWAYS_INLINE R exp(R x) { return fast_exp(x); }
  template <class R>
  static ALWAYS_INLINE R log(R x) { return fast_log(x); }
};

// d(loss)/dz of one element; v and y are its two logits.
template <Kind K, class R>
ALWAYS_INLINE R gradient_of(R v, R y, const Terms<R>& t) {
  const R log_s = t.lse.log_prob(v);
  return gradient_at<K, Fast>(log_s, contrast<K, Fast>(log_s, t.teacher_lse.log_prob(y), t.alpha).kept, t);
}

template <Kind K, bool CAPPED, class R>
ALWAYS_INLINE void grad_sweep(R* __restrict z, const R* __restrict y, int64_t V, const Terms<R>& terms,
                              R flat, R per_cap) {
  const Terms<R> t = terms;
#pragma omp simd
  for (int64_t i = 0; i < V; i++) {
    const R v = z[i], g = gradient_of<K>(v, K == Kind::none ? R(0) : y[i], t) * flat;
    z[i] = CAPPED ? g * (R(1) - v * per_cap * v * per_cap) : g;
  }
}

template <Kind K, class R>
ALWAYS_INLINE void grad_any(R* z, const R* y, int64_t V, const Terms<R>& terms, const Transform<R>& t) {
  const R flat = t.logit_scale * t.inv_temperature,
          per_cap = t.softcap != 0 ? R(1) / (t.inv_temperature * t.softcap) : R(0);
  t.softcap != 0 ? grad_sweep<K, true>(z, y, V, terms, flat, per_cap)
                 : grad_sweep<K, false>(z, y, V, terms, flat, per_cap);
}

template <class R>
struct Kls { R student, teacher; };  // KL(s||t) or KL(s||M), KL(t||s) or KL(t||M)

template <Kind K, class R>
ALWAYS_INLINE Kls<R> kl_sweep(const R* __restrict z, const R* __restrict y, int64_t V, Lse<R> lse,
                              Lse<R> teacher_lse, R alpha) {
  double student = 0, teacher = 0;
  for (int64_t b = 0; b < V; b += BLOCK) {
    const int64_t end = std::min(b + BLOCK, V);
    R a = 0, c = 0;
#pragma omp simd reduction(+ : a, c)
    for (int64_t i = b; i < end; i++) {
      const auto both = contrast<K, Fast>(lse.log_prob(z[i]), teacher_lse.log_prob(y[i]), alpha);
      if (K != Kind::forward) a += both.student;
      if (K != Kind::reverse) c += both.teacher;
    }
    student += a;
    teacher += c;
  }
  return {R(student), R(teacher)};
}

constexpr int64_t STRIP = 256;  // elements looked at together for one that belongs to the k largest

// A heap of the k best so far, its worst on top; strips without a better one are passed over.
template <class R>
ALWAYS_INLINE void select(const R* __restrict z, int64_t V, int64_t k, int64_t* ids,
                          std::pair<R, int64_t>* heap) {
  using Item = std::pair<R, int64_t>;
  const auto better = [](const Item& a, const Item& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  const auto key = [](R x) { return x == x ? x : -std::numeric_limits<R>::infinity(); };  // a NaN sorts last
  for (int64_t i = 0; i < k; i++) heap[i] = {key(z[i]), i};
  std::make_heap(heap, heap + k, better);
  for (int64_t b = k; b < V; b += STRIP) {
    const int64_t end = std::min(b + STRIP, V);
    R best = -std::numeric_limits<R>::infinity();
#pragma omp simd reduction(max : best)
    for (int64_t i = b; i < end; i++) best = z[i] > best ? z[i] : best;
    if (!(best > heap[0].first)) continue;
    for (int64_t i = b; i < end; i++) {
      if (!(z[i] > heap[0].first)) continue;
      std::pop_heap(heap, heap + k, better);
      heap[k - 1] = {z[i], i};
      std::push_heap(heap, heap + k, better);
    }
  }
  std::sort_heap(heap, heap + k, better);
  for (int64_t i = 0; i < k; i++) ids[i] = heap[i].second;
}

// The sweeps, compiled once for each instruction set.
template <class R>
struct Sweeps {
  Kls<R> (*kl)(Kind, const R*, const R*, int64_t, Lse<R>, Lse<R>, R);
  void (*grad)(Kind, R*, const R*, int64_t, const Terms<R>&, const Transform<R>&);
  Lse<R> (*lse)(R*, int64_t);
  void (*select)(const R*, int64_t, int64_t, int64_t*, std::pair<R, int64_t>*);
};

#define SWEEPS(NAME, TARGET)                                                                                 \
  template <class R>                                                                                         \
  struct NAME {                                                                                              \
    TARGET static Kls<R> kl(Kind kind, const R* z, const R* y, int64_t V, Lse<R> lse, Lse<R> teacher_lse,    \
                            R alpha) {                                                                       \
      switch (kind) {                                                                                        \
        case Kind::forward:                                                                                  \
          return kl_sweep<Kind::forward>(z, y, V, lse, teacher_lse, alpha);                                  \
        case Kind::reverse:                                                                                  \
          return kl_sweep<Kind::reverse>(z, y, V, lse, teacher_lse, alpha);                                  \
        default:                                                                                             \
          return kl_sweep<Kind::mixed>(z, y, V, lse, teacher_lse, alpha);                                    \
      }                                                                                                      \
    }                                                                                                        \
    TARGET static void grad(Kind kind, R* z, const R* y, int64_t V, const Terms<R>& terms,                   \
                            const Transform<R>& t) {                                                         \
      switch (kind) {                                                                                        \
        case Kind::none:                                                                                     \
          return grad_any<Kind::none>(z, y, V, terms, t);                                                    \
        case Kind::forward:                                                                                  \
          return grad_any<Kind::forward>(z, y, V, terms, t);                                                 \
        case Kind::reverse:                                                                                  \
          return grad_any<Kind::reverse>(z, y, V, terms, t);                                                 \
        default:                                                                                             \
          return grad_any<Kind::mixed>(z, y, V, terms, t);                                                   \
      }                                                                                                      \
    }                                                                                                        \
    TARGET static Lse<R> lse(R* z, int64_t V) {                                                              \
      return stats_sweep(z, V, Transform<R>{R(1), R(0), R(1), nullptr}, false).lse;                          \
    }                                                                                                        \
    TARGET static void select(const R* z, int64_t V, int64_t k, int64_t* ids, std::pair<R, int64_t>* heap) { \
      drift::select(z, V, k, ids, heap);                                                                     \
    }                                                                                                        \
  };

SWEEPS(Baseline, )
#if defined(__x86_64__)
SWEEPS(Avx2, DRIFT_AVX2)
SWEEPS(Avx512, DRIFT_AVX512)
#endif

template <class R>
Sweeps<R> sweeps() {
#if defined(__x86_64__)
  if (simd() == Simd::avx512) return {Avx512<R>::kl, Avx512<R>::grad, Avx512<R>::lse, Avx512<R>::select};
  if (simd() == Simd::avx2) return {Avx2<R>::kl, Avx2<R>::grad, Avx2<R>::lse, Avx2<R>::select};
#endif
  return {Baseline<R>::kl, Baseline<R>::grad, Baseline<R>::lse, Baseline<R>::select};
}

int64_t taught_row(const int64_t* taught, int64_t i) { return taught ? taught[i] : i; }

// What other terms of the loss ask of row i: d(loss)/d(log-prob of its target), and all that a sweep needs.
template <class R>
struct Other {
  R target;
  Terms<R> terms;
};
template <class R>
Other<R> other_terms(const Rows& rows, const Coefs& c, int64_t i) {
  const R target = rows.targets && rows.targets[i] >= 0 ? at<R>(c.logprobs, i, R(0)) : R(0);
  return {target,
          {{static_cast<const R*>(c.lse)[i], at<R>(c.lse_low, i, R(0))},
           target - at<R>(c.row_lse, i, R(0)),
           at<R>(c.entropy, i, R(0)),
           at<R>(c.row_entropy, i, R(0))}};
}
template <class R>
bool any(const Other<R>& o, const Coefs& c, int64_t i) {
  return o.target != 0 || o.terms.E != 0 || at<R>(c.row_lse, i, R(0)) != 0;
}

// The gradient of row i over its z, with the target's own term.
template <class R>
void differentiate(const Rows& rows, int64_t i, Kind kind, const R* teacher, const Other<R>& o) {
  R* z = row_of<R>(rows, i);
  const auto transform = transform_of<R>(rows, i);
  const int64_t y = o.target != 0 ? rows.targets[i] : -1;
  const R slope = y >= 0 ? transform.slope(z[y]) : R(0);
  sweeps<R>().grad(kind, z, teacher, rows.vocab, o.terms, transform);
  if (y >= 0) z[y] += slope * o.target;
}

}  // namespace

template <class R>
void top_k(const Rows& rows, const int64_t* taught, const Buckets& buckets) {
  const int64_t k = buckets.k;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    const int64_t j = taught_row(taught, i);
    if (j < 0) continue;
    std::vector<std::pair<R, int64_t>> heap(k);
    sweeps<R>().select(row_of<R>(rows, i), rows.vocab, k, buckets.ids + j * k, heap.data());
  }
}

template <class R>
void bucket_logprobs(const Rows& rows, const int64_t* taught, const void* lse, const void* lse_low,
                     const Buckets& buckets) {
  const int64_t k = buckets.k;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    const int64_t j = taught_row(taught, i);
    if (j < 0) continue;
    R* z = row_of<R>(rows, i);
    const Lse<R> all{static_cast<const R*>(lse)[i], at<R>(lse_low, i, R(0))};
    const int64_t* ids = buckets.ids + j * k;
    R* logprobs = static_cast<R*>(buckets.logprobs) + j * k;
    for (int64_t a = 0; a < k; a++) logprobs[a] = z[ids[a]];
    double kept = 0;
    for (int64_t a = 0; a < k; a++) kept += std::exp(double(all.log_prob(logprobs[a])));
    if (buckets.rest && !(kept > 0.5)) {
      put<R>(buckets.rest, j, R(std::log1p(-kept)));
    } else if (buckets.rest) {  // 1 - kept would cancel: sum what is not among the k
      for (int64_t a = 0; a < k; a++) z[ids[a]] = -std::numeric_limits<R>::infinity();
      const auto rest = sweeps<R>().lse(z, rows.vocab);
      const R others = (rest.high - all.high) + (rest.low - all.low);
      for (int64_t a = k - 1; a >= 0; a--) z[ids[a]] = logprobs[a];
      put<R>(buckets.rest, j, others > 0 ? R(0) : others);
    }
    for (int64_t a = 0; a < k; a++) logprobs[a] = all.at_most_0(logprobs[a]);
  }
}

template <class R>
void fused_distill(const Rows& rows, const Coefs& coefs, const int64_t* taught, const Teacher& teacher,
                   uint8_t* live) {
  const Kind kind = kind_of(teacher.alpha);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    const int64_t j = taught_row(taught, i);
    auto o = other_terms<R>(rows, coefs, i);
    auto& t = o.terms;
    t.alpha = R(teacher.alpha);
    const R* y = nullptr;
    if (j >= 0) {
      y = static_cast<const R*>(teacher.logits) + j * teacher.stride;
      t.teacher_lse = {static_cast<const R*>(teacher.lse)[j], at<R>(teacher.lse_low, j, R(0))};
      t.weight = at<R>(teacher.weights, i, R(0));
      const auto kl = sweeps<R>().kl(kind, row_of<R>(rows, i), y, rows.vocab, t.lse, t.teacher_lse, t.alpha);
      t.student_kl = kl.student;
      put<R>(teacher.divergence, j, divergence_of(kind, t.alpha, kl.student, kl.teacher));
    }
    if (!teacher.gradient) continue;
    live[i] = t.weight != 0 || any(o, coefs, i);
    if (live[i]) differentiate(rows, i, t.weight != 0 ? kind : Kind::none, y, o);
  }
}

template <class R>
void grad_buckets(const Rows& rows, const Coefs& coefs, const int64_t* taught, const Buckets& buckets,
                  uint8_t* live) {
  const R HUGE_SHARE = R(std::is_same<R, float>::value ? 1e38 : 1e300);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < rows.rows; i++) {
    R* z = row_of<R>(rows, i);
    const int64_t j = taught_row(taught, i), k = j < 0 ? 0 : buckets.k;
    auto o = other_terms<R>(rows, coefs, i);
    const R drest = k ? at<R>(buckets.drest, j, R(0)) : R(0);
    const R* dlogprobs = static_cast<const R*>(buckets.dlogprobs) + j * k;
    const int64_t* ids = buckets.ids + j * k;
    live[i] = any(o, coefs, i) || drest != 0;
    R kept = 0;
    for (int64_t a = 0; a < k; a++) {
      live[i] |= dlogprobs[a] != 0;
      kept += dlogprobs[a];
    }
    if (!live[i]) continue;
    const R others = o.terms.P;
    o.terms.P = others + kept + drest;
    const auto transform = transform_of<R>(rows, i);
    struct Own { R slope, rest; };  // dz/dx, and all of the gradient but the bucket's own term
    std::vector<Own> own(k);
    for (int64_t a = 0; a < k; a++) {
      const R v = z[ids[a]], slope = transform.slope(v);
      own[a] = {slope, slope * gradient_of<Kind::none>(v, R(0), o.terms) +
                           (o.target != 0 && ids[a] == rows.targets[i] ? slope * o.target : R(0))};
    }
    // a token of the rest gets its share of drest, p / rest; drest - drest / rest in one, since it cancels
    if (drest != 0) {
      const R share = std::min(std::expm1(-static_cast<const R*>(buckets.rest)[j]), HUGE_SHARE);
      o.terms.P = std::min(std::max(others + kept - drest * share, -HUGE_SHARE), HUGE_SHARE);
    }
    differentiate<R>(rows, i, Kind::none, nullptr, o);
    for (int64_t a = 0; a < k; a++) z[ids[a]] = own[a].rest + own[a].slope * dlogprobs[a];
  }
}

#define INSTANTIATE(R)                                                                        \
  template void top_k<R>(const Rows&, const int64_t*, const Buckets&);                        \
  template void bucket_logprobs<R>(const Rows&, const int64_t*, const void*, const void*, const Buckets&); \
  template void fused_distill<R>(const Rows&, const Coefs&, const int64_t*, const Teacher&, uint8_t*);\
  template void grad_buckets<R>(const Rows&, const Coefs&, const int64_t*, const Buckets&, uint8_t*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace drift
