// What the row kernels are made of: 16-byte loads and stores, a sum of exponentials that carries
// its own maximum, and the reductions over a warp, a block and a cluster. Every reduction has one
// fixed order, so results repeat bitwise.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace drift {

constexpr int WARP = 32, MAX_THREADS = 512, MAX_WARPS = MAX_THREADS / WARP, MAX_CLUSTER = 8;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float FLOOR = -200.0f;  // exp of it is 0 in fp32; keeps 0 * -inf out of e * log(e)

// ---- vectors

template <int N>
using Count = std::integral_constant<int, N>;

// How many elements lie between p and the next 16-byte boundary.
template <class T>
__device__ __forceinline__ int lead_of(const T* p) {
  return static_cast<int>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
}

// N floats from p, 16 bytes at a time where `aligned`.
template <int N>
__device__ __forceinline__ void load(const float* p, float* v, bool aligned) {
  if (N % 4 == 0 && aligned) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 q = *reinterpret_cast<const float4*>(p + i);
      v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = p[i];
  }
}

__device__ __forceinline__ float narrow(float x, float) { return x; }
__device__ __forceinline__ __nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ __half narrow(float x, __half) { return __float2half_rn(x); }

// N values to p in device memory, which lies on a 16-byte boundary where they make 16 bytes.
// The compiler would cut a plain assignment of 16 bytes into smaller ones, hence the
// intrinsic (its policy is the ordinary one).
template <int N, class T>
__device__ __forceinline__ void store(T* p, const float* v) {
  if constexpr (N * sizeof(T) == 16 && std::is_same_v<T, float>) {
    __stwb(reinterpret_cast<float4*>(p), float4{v[0], v[1], v[2], v[3]});
  } else if constexpr (N * sizeof(T) == 16) {
    alignas(16) T narrowed[N];
#pragma unroll
    for (int i = 0; i < N; i++) narrowed[i] = narrow(v[i], T());
    __stwb(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(narrowed));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) p[i] = narrow(v[i], T());
  }
}

// The same to shared memory.
template <int N>
__device__ __forceinline__ void keep(float* p, const float* v) {
  if constexpr (N == 4) *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
  else *p = *v;
}

struct Slice { int64_t begin, end; };  // columns of a row

// The columns of a slice, each once, over the threads of a block: the first `lead` and the last few singly,
// the rest in vectors of N columns, U of them at a time, `step` columns apart, so that U loads are in flight.
// visit(column, step, Count<N>, Count<U>).
template <int N, int U, class F>
__device__ __forceinline__ void for_columns(Slice s, int lead, F&& visit) {
  const int64_t first = s.begin + lead, vectors = first < s.end ? (s.end - first) / N : 0;
  const int64_t thread = threadIdx.x, threads = blockDim.x, head = s.begin + thread,
                tail = first + vectors * N + thread;
  if (head < first && head < s.end) visit(head, threads, Count<1>(), Count<1>());
  int64_t v = thread;
  if constexpr (U > 1)
    for (; v + (U - 1) * threads < vectors; v += U * threads)
      visit(first + v * N, threads * N, Count<N>(), Count<U>());
  for (; v < vectors; v += threads) visit(first + v * N, threads * N, Count<N>(), Count<1>());
  if (tail < s.end) visit(tail, threads, Count<1>(), Count<1>());
}

// ---- sums of exponentials

// Of numbers z seen so far: their maximum m, and sums of e, e * (z - m), e * e and z, with e = exp(z - m).
struct Sums {
  float max, e, ed, ee, z;

  __device__ __forceinline__ void rescale(float to) {  // to >= max
    const float shift = max - to, k = expf(shift);
    ed = k * fmaf(fmaxf(shift, FLOOR), e, ed);
    e *= k;
    ee *= k * k;
    max = to;
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&v)[N]) {
    float top = v[0];
#pragma unroll
    for (int i = 1; i < N; i++) top = fmaxf(top, v[i]);  // fmaxf passes over NaN; the sums do not
    if (top > max) rescale(top);
    const float base = max == -INFINITY ? 0.0f : max;
    float a = 0, ad = 0, aa = 0, az = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float d = v[i] - base, x = expf(d);
      a += x;
      ad = fmaf(x, fmaxf(d, FLOOR), ad);
      aa = fmaf(x, x, aa);
      az += v[i];
    }
    e += a, ed += ad, ee += aa, z += az;
  }

  __device__ __forceinline__ void add(Sums o) {
    const float top = fmaxf(max, o.max);
    if (max != top) rescale(top);
    if (o.max != top) o.rescale(top);
    e += o.e, ed += o.ed, ee += o.ee, z += o.z;
  }

  static __device__ __forceinline__ Sums nothing() { return {-INFINITY, 0, 0, 0, 0}; }
};

// N plain sums.
template <int N>
struct Totals {
  float of[N];

  __device__ __forceinline__ void add(const Totals& o) {
#pragma unroll
    for (int i = 0; i < N; i++) of[i] += o.of[i];
  }
  static __device__ __forceinline__ Totals nothing() { return {}; }
};

// ---- reductions

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) v += __shfl_xor_sync(ALL_LANES, v, d);
  return v;
}

__device__ __forceinline__ Sums warp_sum(Sums s) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) {
    Sums o;
    o.max = __shfl_xor_sync(ALL_LANES, s.max, d);
    o.e = __shfl_xor_sync(ALL_LANES, s.e, d);
    o.ed = __shfl_xor_sync(ALL_LANES, s.ed, d);
    o.ee = __shfl_xor_sync(ALL_LANES, s.ee, d);
    o.z = __shfl_xor_sync(ALL_LANES, s.z, d);
    s.add(o);
  }
  return s;
}

template <int N>
__device__ __forceinline__ Totals<N> warp_sum(Totals<N> s) {
#pragma unroll
  for (int i = 0; i < N; i++) s.of[i] = warp_sum(s.of[i]);
  return s;
}

// The blocks that share a row. Before sm_90 there is no cluster: a row is one block's.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct Cluster {
  cooperative_groups::cluster_group group = cooperative_groups::this_cluster();
  __device__ __forceinline__ unsigned rank() const { return group.block_rank(); }
  __device__ __forceinline__ unsigned size() const { return group.num_blocks(); }
  __device__ __forceinline__ void sync() const { group.sync(); }
  template <class T>
  __device__ __forceinline__ T* shared_of(T* mine, unsigned rank) const {
    return group.map_shared_rank(mine, rank);
  }
};
#else
struct Cluster {
  __device__ __forceinline__ unsigned rank() const { return 0; }
  __device__ __forceinline__ unsigned size() const { return 1; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ __forceinline__ T* shared_of(T* mine, unsigned) const { return mine; }
};
#endif

// The sums of a whole row, in warp 0 of every block of its cluster (elsewhere: something else). Until the
// cluster's next sync() other blocks may still be reading this one's shared memory.
template <class T>
__device__ __forceinline__ T row_sum(const Cluster& cluster, T s) {
  __shared__ T partial[MAX_WARPS];
  s = warp_sum(s);
  if (lane() == 0) partial[warp()] = s;
  cluster.sync();
  if (warp() != 0) return s;
  const unsigned warps = blockDim.x / WARP;
  T total = T::nothing();
  for (unsigned k = lane(); k < warps * cluster.size(); k += WARP)
    total.add(cluster.shared_of(partial, k / warps)[k % warps]);
  return warp_sum(total);
}

// The same in every thread, after which shared memory is free again.
template <class T>
__device__ __forceinline__ T row_total(const Cluster& cluster, T s) {
  __shared__ T total;
  s = row_sum(cluster, s);
  if (threadIdx.x == 0) total = s;
  cluster.sync();
  return total;
}

}  // namespace drift
