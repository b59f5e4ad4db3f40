// What the kernels of distillation read beside two rows: which teacher's row goes with a student's, and what
// the other terms of the loss add to a row's gradient.
#pragma once
#include "../divergence.h"
#include "logits.h"

namespace drift {

struct Accurate {  // exp and log of divergence.h
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float log(float x) { return logf(x); }
};

__device__ __forceinline__ int64_t taught_row(const int64_t* taught, int64_t row) {
  return taught ? taught[row] : row;
}

struct Others {
  int column;    // of the target, -1 where nothing is asked of it
  float target;  // d(loss)/d(its log-prob)
  bool any;
  Terms<float> terms;

  __device__ Others(const Rows& rows, const Coefs& c, int64_t row) {
    const int64_t y = rows.targets ? rows.targets[row] : -1;
    const float of_lse = at(c.row_lse, row, 0.0f);
    target = y >= 0 ? at(c.logprobs, row, 0.0f) : 0.0f;
    column = target != 0 && y < rows.vocab ? static_cast<int>(y) : -1;
    terms.lse = {static_cast<const float*>(c.lse)[row], at(c.lse_low, row, 0.0f)};
    terms.P = target - of_lse;
    terms.E = at(c.entropy, row, 0.0f), terms.H = at(c.row_entropy, row, 0.0f);
    any = target != 0 || terms.E != 0 || of_lse != 0;
  }
};

}  // namespace drift
