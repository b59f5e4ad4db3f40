// A row of products in device memory: which columns are a block's, and the way from a product to a logit.
#pragma once
#include "../rows.h"
#include "device.h"

namespace drift {

__device__ __forceinline__ float at(const void* p, int64_t i, float otherwise) {
  return p ? static_cast<const float*>(p)[i] : otherwise;
}
__device__ __forceinline__ void put(void* p, int64_t i, float v) { if (p) static_cast<float*>(p)[i] = v; }

// x -> z, and dz/dx from z. PLAIN: neither bias nor softcap.
template <bool PLAIN>
struct Transform {
  const float* bias;
  float scale, softcap, per_cap, inverse, flat, tanh_of;

  __device__ Transform(const Rows& rows, int64_t row, bool identity) {
    inverse = identity ? 1.0f : at(rows.inv_temperature, row, float(rows.scalar_inv_temperature));
    scale = identity ? 1.0f : float(rows.logit_scale);
    softcap = identity ? 0.0f : float(rows.softcap);
    bias = identity ? nullptr : static_cast<const float*>(rows.bias);
    per_cap = 1.0f / softcap;
    flat = scale * inverse;
    tanh_of = 1.0f / (inverse * softcap);
  }
  // Rounded before anything is subtracted, so that a target's logit is
  // the very number that went into the sums.
  __device__ __forceinline__ float operator()(float x, int64_t column) const {
    if (PLAIN) return __fmul_rn(x, flat);
    float u = scale * (bias ? x + bias[column] : x);
    if (softcap != 0) u = softcap * tanhf(u * per_cap);
    return __fmul_rn(u, inverse);
  }
  __device__ __forceinline__ float slope(float z) const {
    if (PLAIN || softcap == 0) return flat;
    const float t = z * tanh_of;
    return flat * fmaf(-t, t, 1.0f);
  }
};

__host__ __device__ __forceinline__ int64_t columns_of(int64_t vocab, int64_t blocks) {
  return ((vocab + blocks - 1) / blocks + 31) / 32 * 32;
}

__device__ __forceinline__ Slice slice_of(int64_t vocab, const Cluster& cluster) {
  const int64_t columns = columns_of(vocab, cluster.size()), begin = columns * cluster.rank();
  return {begin < vocab ? begin : vocab, begin + columns < vocab ? begin + columns : vocab};
}


// One row, and its logits as `row_stats` has them: without bias and softcap there is one factor.
struct Row {
  const float* x;
  Transform<false> t;
  bool plain;

  __device__ Row(const Rows& rows, int64_t row)
      : x(static_cast<const float*>(rows.logits) + row * rows.stride),
        t(rows, row, false),
        plain(!rows.bias && rows.softcap == 0) {}

  __device__ __forceinline__ float at(int64_t j) const {
    return plain ? __fmul_rn(x[j], t.flat) : t(x[j], j);
  }
  // N columns from j, and U - 1 times as many, each `step` columns on.
  template <int N, int U>
  __device__ __forceinline__ void read(float* z, int64_t j, int64_t step, bool aligned) const {
#pragma unroll
    for (int u = 0; u < U; u++) load<N>(x + j + u * step, z + u * N, aligned);
    if (plain) {
#pragma unroll
      for (int i = 0; i < N * U; i++) z[i] = __fmul_rn(z[i], t.flat);
    } else {
#pragma unroll
      for (int i = 0; i < N * U; i++) z[i] = t(z[i], j + i / N * step + i % N);
    }
  }
};

}  // namespace drift
