// Row kernels: what a backend supplies. Plain pointers and sizes; R is float or double.
//
// A row is one hidden state's logits. It has the targets row_ptr[i] .. row_ptr[i + 1] (CSR), or target i
// where row_ptr is null. z = softcap(logit_scale * (x + bias)) / temperature is written over the product x.
#pragma once
#include <cstdint>
#include "policy.h"

namespace drift {

// A log-sum-exp in two parts. Logits may share an offset that dwarfs their spread; the rounding of max +
// log(sum) would then be the error of every log-prob. High is that sum, low what its rounding took, so that
// log-probs are exact to ulps of the spread.
template <class R>
struct Lse {
  R high, low;
  DRIFT_HD static Lse of(double max, double log_sum) {
    const R high = R(max + log_sum);
    const double low =
        std::fabs(max) < std::fabs(log_sum) ? (log_sum - double(high)) + max : (max - double(high)) + log_sum;
    return {high, low - low == 0 ? R(low) : R(0)};  // a sum that is infinite or NaN has no remainder
  }
  DRIFT_HD R log_prob(R z) const { return (z - high) - low; }
  // log(sum) >= 0 holds in exact arithmetic; rounding must not make a probability above 1
  DRIFT_HD R at_most_0(R z) const {
    const R lp = log_prob(z);
    return lp > R(0) ? R(0) : lp;
  }
};

struct Rows {
  void* logits = nullptr;                  // [rows, stride], in: products or logits; out: see each kernel
  int64_t rows = 0, vocab = 0, stride = 0;
  const int64_t* row_ptr = nullptr;        // [rows + 1] or null
  const int64_t* targets = nullptr;        // [entries]; negative takes no part
  const void* bias = nullptr;              // [vocab] or null
  const void* inv_temperature = nullptr;   // [rows] or null (then the scalar below)
  double scalar_inv_temperature = 1, logit_scale = 1, softcap = 0;  // softcap 0 = none
};

struct Stats {                             // null = not wanted
  void* logprobs = nullptr;                // [entries]
  void* top1 = nullptr;                    // [entries] 1 where no logit exceeds the target's
  void* lse = nullptr;                     // [rows]
  // [rows] what rounding took from lse: lse + lse_low is the log-sum-exp
  void* lse_low = nullptr;
  void* entropy = nullptr;                 // [rows]
  void* mean_logits = nullptr;             // [rows]
  void* log_sum_sq = nullptr;              // [rows] log of the sum of squared probabilities
};

struct Coefs {                             // d(loss)/d(...), null = zero everywhere
  const void* logprobs = nullptr;          // [entries]
  const void* entropy = nullptr;           // [rows]
  const void* row_entropy = nullptr;       // [rows] the entropy itself, with `entropy`
  const void* lse = nullptr;               // [rows] the log-sum-exp itself
  const void* lse_low = nullptr;           // [rows] what rounding took from it; null = 0
  const void* row_lse = nullptr;           // [rows] d(loss)/d(log-sum-exp)
};

struct Policy {
  PolicyParams params;
  // [entries], null = 1, on-policy, none, 1
  const void *advantages = nullptr, *old = nullptr, *ref = nullptr, *weights = nullptr;
  // [entries] out; only loss is required
  void *loss = nullptr, *ratio = nullptr, *kl = nullptr, *clipped = nullptr;
  bool gradient = false;
};

struct Teacher {                           // whole logits
  const void* logits = nullptr;            // [taught rows, stride]
  int64_t stride = 0;
  const void* lse = nullptr;               // [taught rows]
  const void* lse_low = nullptr;           // [taught rows] or null
  const void* weights = nullptr;           // [rows] of the student: of each divergence
  // 0: KL(t||s); 1: KL(s||t); between, M = (1-a) s + a t: (1-a) KL(s||M) + a KL(t||M)
  double alpha = 0.5;
  void* divergence = nullptr;              // [taught rows] out
  bool gradient = false;
};

struct Buckets {                           // k tokens a row, and the rest as one more
  int64_t* ids = nullptr;                  // [taught rows, k], distinct within a row
  int64_t k = 0;
  void* logprobs = nullptr;                // [taught rows, k]
  // [taught rows] log-prob of all other tokens, -inf where there is none; null = left out
  void* rest = nullptr;
  const void *dlogprobs = nullptr, *drest = nullptr;  // likewise d(loss)/d(...)
};

// logits become z; statistics are filled.
template <class R> void row_stats(const Rows& rows, const Stats& stats);
// Products (raw) or z become d(loss)/d(product); rows without any coefficient are left
// alone and marked dead in live [rows].
template <class R> void grad_logits(const Rows& rows, const Coefs& coefs, bool raw, uint8_t* live);
// Both, with the policy arithmetic between them, one row at a time while it is in cache.
template <class R>
void fused_policy(const Rows& rows, const Stats& stats, const Policy& policy, uint8_t* live);

// Below, taught [rows] says which row of the teacher's goes with each of the student's, -1 for none; null =
// its own. Student rows are logits (z), on a GPU products, with one target each, and Coefs is what other
// terms of the loss add to their gradient.
//
// The k largest of each row into ids, largest first and the lower of equal ones before.
template <class R> void top_k(const Rows& rows, const int64_t* taught, const Buckets& buckets);
// Log-probs of the ids and of the rest, by the log-sum-exps lse + lse_low [rows].
template <class R>
void bucket_logprobs(const Rows& rows, const int64_t* taught, const void* lse, const void* lse_low,
                     const Buckets& buckets);
// Divergences and, with gradient, d(loss)/d(product) over the student's z, one pair
// of rows at a time while it is in cache.
template <class R>
void fused_distill(const Rows& rows, const Coefs& coefs, const int64_t* taught, const Teacher& teacher,
                   uint8_t* live);
// d(loss)/d(product) over the student's z, the loss being a function of its buckets' log-probs.
template <class R>
void grad_buckets(const Rows& rows, const Coefs& coefs, const int64_t* taught, const Buckets& buckets,
                  uint8_t* live);
// One number for the sizes of the structs above: two libraries that differ
// in it must not pass them to each other.
constexpr uint64_t layout() {
  constexpr uint64_t sizes[] = {sizeof(Rows),         sizeof(Stats),   sizeof(Coefs),  sizeof(Policy),
                                sizeof(PolicyParams), sizeof(Teacher), sizeof(Buckets)};
  uint64_t n = 1;
  for (const uint64_t size : sizes) n = n * 1009 + size;
  return n;
}
// Moves live rows to the front (in any order); order[k] is where row k came from. Returns how many.
int64_t compact(void* logits, int64_t rows, int64_t row_bytes, int64_t stride_bytes, const uint8_t* live,
                int64_t* order);

}  // namespace drift
