// Pointwise policy arithmetic: one token's log-prob in, its loss and d(loss)/d(log-prob) out. The only place
// in C++ and CUDA where a policy loss is written; `drift_kernels/formulas.py` is the same in torch.
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define DRIFT_HD __host__ __device__ __forceinline__
#else
#define DRIFT_HD inline __attribute__((always_inline))
#endif

namespace drift {

enum Objective : int {
  CLIP = 0,
  CISPO = 1,
  SAPO = 2,
  REINFORCE = 3,
  DPPO_TV = 4,
  DPPO_KL = 5,
  DRO = 6,
  GPPO = 7
};
enum Kl : int { K1 = 0, K2 = 1, K3 = 2, KABS = 3 };

// The fields of PolicyParams: type, name, default. Python's view of the struct is made of the same list.
#define DRIFT_POLICY_PARAMS(FIELD)                                                               \
  FIELD(int, objective, CLIP)                                                                    \
  FIELD(int, kl_value, K3)     /* the estimator of the value, and that of the gradient:      */  \
  FIELD(int, kl_grad, K3)      /* straight-through forms differ                              */  \
  FIELD(double, low, 0.8)      /* bounds of the ratio (low = 0 if there is none), or of the  */  \
  FIELD(double, high, 1.2)     /* divergence (dppo)                                          */  \
  FIELD(double, dual_clip, 0)  /* 0 = off                                                    */  \
  FIELD(double, delta, INFINITY) /* cap of the ratio before the unclipped product            */  \
  FIELD(double, tau_pos, 1.0)  /* sapo                                                       */  \
  FIELD(double, tau_neg, 1.05)                                                                   \
  FIELD(double, kl_coef, 0)                                                                      \
  FIELD(double, entropy_coef, 0)                                                                 \
  FIELD(double, z_loss_coef, 0)                                                                  \
  FIELD(double, dro_beta, 0)                                                                     \
  FIELD(double, gppo_low, 1)                                                                     \
  FIELD(double, gppo_high, 1)                                                                    \
  FIELD(bool, kl_unbiased, false) /* the KL estimate times the ratio                         */

struct PolicyParams {
#define DRIFT_FIELD(type, name, value) type name = value;
  DRIFT_POLICY_PARAMS(DRIFT_FIELD)
#undef DRIFT_FIELD
};

template <class R>
struct TokenLoss {
  R loss, dlogp;   // objective + kl_coef * kl, and its derivative; entropy and z-loss belong to the row
  R ratio, kl;
  // -1 where the lower bound of the ratio cuts the gradient, +1 where the upper one does, else 0
  R clipped;
};

template <class R>
DRIFT_HD R kl_term(int kind, R d) {
  switch (kind) {
    case K1: return d;
    case K2: return R(0.5) * d * d;
    case K3: return std::exp(-d) + d - R(1);
    default: return std::fabs(d);
  }
}

template <class R>
DRIFT_HD R kl_slope(int kind, R d) {
  switch (kind) {
    case K1: return R(1);
    case K2: return d;
    case K3: return R(1) - std::exp(-d);
    default: return d > 0 ? R(1) : (d < 0 ? R(-1) : R(0));
  }
}

// Whether DPPO's trust region ends here for the move that the advantage asks for: q
// is the old probability, p the new one.
template <class R>
DRIFT_HD bool beyond_region(const PolicyParams& p, R advantage, R logp, R old) {
  const R now = std::exp(logp), before = std::exp(old);
  const R move = advantage > 0 ? now - before : before - now, bound = advantage > 0 ? R(p.high) : R(p.low);
  if (p.objective == DPPO_TV) return move > bound;
  const R tiny = R(1e-8);
  const R kl =
      before * (old - logp) + (R(1) - before) * std::log((R(1) - before + tiny) / (R(1) - now + tiny));
  return move > 0 && kl > bound;
}

// has_old = false is on-policy: the ratio is 1 and its gradient that of logp.
template <class R>
DRIFT_HD TokenLoss<R> policy_token(const PolicyParams& p, R logp, R advantage, bool has_old, R old,
                                   bool has_ref, R ref) {
  const R A = advantage;
  const R raw = logp - (has_old ? old : logp);  // on-policy 0, but NaN where logp is
  const R log_ratio = raw > R(20) ? R(20) : (raw < R(-20) ? R(-20) : raw);
  // the clamp has no slope outside; NaN stays NaN
  const R inside = (raw != raw || log_ratio == raw) ? R(1) : R(0);
  const R r = std::exp(raw != raw ? raw : log_ratio);
  const R low = R(p.low), high = R(p.high);
  TokenLoss<R> out{R(0), R(0), r, R(0), R(0)};
  const bool below = r < low, above = r > high;
  const R clip = below ? low : (above ? high : r);
  switch (p.objective) {
    case CLIP: {
      const bool capped = r > R(p.delta);
      const R free = (capped ? R(p.delta) : r) * A, bound = clip * A;
      R loss, slope;
      if (free <= bound || free != free) {
        loss = -free;
        slope = capped ? R(0) : -r * A * inside;
        if (free != free) slope = free;
      } else {
        loss = -bound;
        slope = (below || above) ? R(0) : -r * A * inside;
        out.clipped = below ? R(-1) : (above ? R(1) : R(0));
      }
      if (p.dual_clip > 0 && A < 0 && loss > -R(p.dual_clip) * A) {
        loss = -R(p.dual_clip) * A;
        slope = R(0);
      }
      out.loss = loss;
      out.dlogp = slope;
      break;
    }
    case CISPO:
      out.loss = -clip * A * logp;
      out.dlogp = -clip * A;
      out.clipped = A == 0 ? R(0) : below ? R(-1) : (above ? R(1) : R(0));
      break;
    case SAPO: {
      const R tau = A > 0 ? R(p.tau_pos) : R(p.tau_neg);
      const R s = R(1) / (R(1) + std::exp(-tau * (r - R(1))));
      out.loss = -(R(4) / tau) * s * A;
      out.dlogp = -R(4) * s * (R(1) - s) * r * A * inside;
      break;
    }
    case DPPO_TV:
    case DPPO_KL: {
      const R kept = r > R(p.delta) ? R(p.delta) : r;
      if (beyond_region<R>(p, A, logp, has_old ? old : logp)) {
        out.clipped = A > 0 ? R(1) : (A < 0 ? R(-1) : R(0));
      } else {
        out.loss = -kept * A * logp;
        out.dlogp = -kept * A;
      }
      break;
    }
    case DRO:
      out.loss = -A * logp + R(0.5) * R(p.dro_beta) * raw * raw;
      out.dlogp = -A + R(p.dro_beta) * raw;
      break;
    case GPPO: {
      const R side = below && A < 0 ? R(-1) : (above && A > 0 ? R(1) : R(0));
      const R held = side < 0 ? R(p.gppo_low) * low : R(p.gppo_high) * high;
      out.loss = -(side == 0 ? r : held) * A;
      out.dlogp = -(side == 0 ? r * inside : held) * A;
      out.clipped = side;
      break;
    }
    default:
      out.loss = -A * logp;
      out.dlogp = -A;
  }
  if (has_ref) {
    const R d = logp - ref;
    R slope = kl_slope<R>(p.kl_grad, d);
    out.kl = kl_term<R>(p.kl_value, d);
    if (p.kl_unbiased) {
      slope = (slope + out.kl * inside) * r;
      out.kl *= r;
    }
    if (p.kl_coef != 0) {
      out.loss += R(p.kl_coef) * out.kl;
      out.dlogp += R(p.kl_coef) * slope;
    }
  }
  return out;
}

}  // namespace drift
