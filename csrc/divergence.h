// The generalised divergence of two distributions over a vocabulary, one token at a time: student s, teacher
// t, M = (1 - a) s + a t; KL(t||s) at a = 0, KL(s||t) at a = 1, (1 - a) KL(s||M) + a KL(t||M) between. The
// only place in C++ and CUDA where it is written; `drift_kernels/divergences.py` is the same in torch. `Math`
// has a backend's exp and log.
#pragma once
#include "rows.h"

namespace drift {

enum class Kind { none, forward, reverse, mixed };  // no teacher, KL(t||s), KL(s||t), between

DRIFT_HD Kind kind_of(double alpha) {
  return alpha == 0 ? Kind::forward : alpha == 1 ? Kind::reverse : Kind::mixed;
}

// What one token adds to KL(s||t) or KL(s||M), and to KL(t||s) or KL(t||M), where 0 * inf is 0; and what of
// the teacher the gradient there needs: t, log(s/t) or log(s/M).
template <class R>
struct Contrast { R student, teacher, kept; };

template <class R>
struct LogRatios { R student, teacher; };  // log(s/M), log(t/M)

// Written so that no exp overflows, and that a probability of 0 on one side leaves the other's term finite.
template <class Math, class R>
DRIFT_HD LogRatios<R> against_mixture(R log_s, R log_t, R alpha) {
  const R u = log_t - log_s;
  const bool more = !(u <= 0);  // a NaN goes where u is part of the result, since a fast log may swallow it
  const R own = more ? alpha : R(1) - alpha;
  const R r = Math::log(own + (R(1) - own) * Math::exp(more ? -u : u));  // log(M / max(s, t))
  return {(more ? -u : R(0)) - r, (more ? R(0) : u) - r};
}

template <Kind K, class Math, class R>
DRIFT_HD Contrast<R> contrast(R log_s, R log_t, R alpha) {
  if (K == Kind::none) return {R(0), R(0), R(0)};
  const R s = Math::exp(log_s), t = Math::exp(log_t);
  if (K == Kind::forward) return {R(0), t != 0 ? t * (log_t - log_s) : R(0), t};
  if (K == Kind::reverse) return {s != 0 ? s * (log_s - log_t) : R(0), R(0), log_s - log_t};
  const auto r = against_mixture<Math>(log_s, log_t, alpha);
  return {s != 0 ? s * r.student : R(0), t != 0 ? t * r.teacher : R(0), r.student};
}

// What a row's gradient is made of besides its log-probs.
template <class R>
struct Terms {
  Lse<R> lse;
  R P, E, H;                     // terms of the rest of the loss: -P p - E p (log p + H)
  Lse<R> teacher_lse{R(0), R(0)};
  R alpha = 0;
  R weight = 0, student_kl = 0;  // of the divergence; KL(s||t) or KL(s||M)
};

// d(loss)/dz of one token, without the target's own term; kept as `contrast` gives it.
template <Kind K, class Math, class R>
DRIFT_HD R gradient_at(R log_s, R kept, const Terms<R>& t) {
  const R s = Math::exp(log_s);
  R g = -t.P * s - (s != 0 ? t.E * s * (log_s + t.H) : R(0));
  if (K == Kind::forward) g += t.weight * (s - kept);
  if (K == Kind::reverse) g += s != 0 ? t.weight * s * (kept - t.student_kl) : R(0);
  if (K == Kind::mixed) g += s != 0 ? t.weight * (R(1) - t.alpha) * s * (kept - t.student_kl) : R(0);
  return g;
}

// The divergence from its two sums.
template <class R>
DRIFT_HD R divergence_of(Kind kind, R alpha, R student, R teacher) {
  return kind == Kind::forward   ? teacher
         : kind == Kind::reverse ? student
                                 : (R(1) - alpha) * student + alpha * teacher;
}

}  // namespace drift
