// Row kernels: what a backend supplies. Plain pointers and sizes; R is float or double.
//
// A row is one hidden state's logits. It has the targets row_ptr[i] .. row_ptr[i + 1] (CSR), or target i where row_ptr
// is null. z = softcap(logit_scale * (x + bias)) / temperature is written over the product x.
#pragma once
#include <cstdint>
#include <string>
#include <vector>
#include "policy.h"

namespace drift {

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
  void* entropy = nullptr;                 // [rows]
  void* mean_logits = nullptr;             // [rows]
  void* log_sum_sq = nullptr;              // [rows] log of the sum of squared probabilities
};

struct Coefs {                             // d(loss)/d(...), null = zero everywhere
  const void* logprobs = nullptr;          // [entries]
  const void* entropy = nullptr;           // [rows]
  const void* row_entropy = nullptr;       // [rows] the entropy itself, with `entropy`
  const void* lse = nullptr;               // [rows] the log-sum-exp itself
  const void* row_lse = nullptr;           // [rows] d(loss)/d(log-sum-exp)
};

struct Policy {
  PolicyParams params;
  const void *advantages = nullptr, *old = nullptr, *ref = nullptr, *weights = nullptr;  // [entries], null = 1, on-policy, none, 1
  void *loss = nullptr, *ratio = nullptr, *kl = nullptr, *clipped = nullptr;             // [entries] out; only loss is required
  bool gradient = false;
};

// logits become z; statistics are filled.
template <class R> void row_stats(const Rows& rows, const Stats& stats);
// Products (raw) or z become d(loss)/d(product); rows without any coefficient are left alone and marked dead in live [rows].
template <class R> void grad_logits(const Rows& rows, const Coefs& coefs, bool raw, uint8_t* live);
// Both, with the policy arithmetic between them, one row at a time while it is in cache.
template <class R> void fused_policy(const Rows& rows, const Stats& stats, const Policy& policy, uint8_t* live);
// Moves live rows to the front (in any order); order[k] is where row k came from. Returns how many.
int64_t compact(void* logits, int64_t rows, int64_t row_bytes, int64_t stride_bytes, const uint8_t* live, int64_t* order);

// The instruction sets that the sweeps over a row are compiled for and this CPU has, best last; and, for tests, which of
// them every later call takes. Any thread may set it at any time: a row is swept by one or the other.
std::vector<std::string> row_isas();
void limit_row_isa(const std::string& name);

}  // namespace drift
