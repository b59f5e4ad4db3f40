// Row kernels in CUDA: rows.h on fp32 logits, gradients out of place in fp32, bf16 or fp16. A row belongs to
// one block or, from sm_90 on, to one cluster, whose blocks take a slice of the columns each.
//
// `fused_policy` reads a row from memory once where the slices fit on chip (shared memory, added up over the
// cluster), else twice. Logits are read and gradients written 16 bytes at a time whatever the row's first
// address and its length. There are no atomics. Logits are only read: unlike on a CPU, products stay
// products. exp, tanh and log are the accurate ones (no --use_fast_math). Left out: rows kept in registers (a
// slice of a real vocabulary does not fit), several rows a block (small vocabularies get small blocks
// instead), and bulk copies.
#include "../rows.h"
#include "launch.h"
#include "logits.h"

namespace drift {
namespace {

enum Mode { STATS, GRAD, POLICY };

struct Job {
  Rows rows;
  Stats stats;
  Coefs coefs;
  Policy policy;
  bool raw = true;         // logits are products, not yet z
  void* out = nullptr;     // [rows, out_stride] d(loss)/d(product); null = not wanted
  int64_t out_stride = 0;
  uint8_t* live = nullptr; // [rows] 0 where the gradient is zero for want of a coefficient
  // [5, rows] max, Σe, Σe·(z − max), Σe², Σz of these columns, which may be a part of the vocabulary
  float* sums = nullptr;
  float* at_target = nullptr; // [entries] the target's logit, −inf where it is no column of these
};

constexpr float NO_MAX = -1e38f;

struct RowStats {
  float max;
  Lse<float> lse;
  float entropy, mean, log_sum_sq;
};
// d(loss)/d(sum of the row's log-probs, and lse), d(loss)/d(entropy)
struct Slope { float logprobs, entropy; bool live; };
struct Entry { float coef, weight; };
struct Span { int64_t begin, end; };

__device__ RowStats finish(const Sums& s, int64_t vocab) {
  const double log_e = log(double(s.e));
  return {s.max, Lse<float>::of(s.max, log_e), float(log_e - double(s.ed) / s.e), s.z / float(vocab),
          float(log(double(s.ee)) - 2 * log_e)};
}

// A maximum of nothing is finite in memory, so that whoever merges parts meets no 0 · inf.
__device__ void store_sums(const Job& job, int64_t row, const Sums& s) {
  const float values[] = {fmaxf(s.max, NO_MAX), s.e, s.ed, s.ee, s.z};
  for (int k = 0; k < 5; k++) put(job.sums, row + k * job.rows.rows, values[k]);
}

// Entry k of a row: its coefficient d(loss)/d(log-prob) and weight; with `write` its
// outputs too. z is its target's logit.
template <Mode MODE>
__device__ Entry evaluate(const Job& job, const RowStats& s, int64_t k, bool ignored, float z, bool write) {
  const float logp = s.lse.at_most_0(z);
  if (MODE != GRAD && write) {
    put(job.stats.logprobs, k, ignored ? 0.0f : logp);
    put(job.stats.top1, k, !ignored && z >= s.max ? 1.0f : 0.0f);
  }
  if (MODE == STATS) return {0, 0};
  if (MODE == GRAD) return {ignored ? 0.0f : at(job.coefs.logprobs, k, 0.0f), 0};
  const Policy& o = job.policy;
  const PolicyParams& p = o.params;
  const float w = ignored ? 0.0f : at(o.weights, k, 1.0f);
  const auto token = policy_token<float>(p, logp, at(o.advantages, k, 1.0f), o.old, at(o.old, k, 0.0f), o.ref,
                                         at(o.ref, k, 0.0f));
  if (write) {
    float loss = token.loss;
    if (p.entropy_coef != 0) loss -= float(p.entropy_coef) * s.entropy;
    if (p.z_loss_coef != 0) loss += float(p.z_loss_coef) * s.lse.high * s.lse.high;
    put(o.loss, k, w != 0 ? w * loss : 0.0f);
    put(o.ratio, k, ignored ? 0.0f : token.ratio);
    put(o.kl, k, ignored ? 0.0f : token.kl);
    put(o.clipped, k, w != 0 ? token.clipped : 0.0f);
  }
  return {w != 0 ? w * token.dlogp : 0.0f, w};
}

// d(loss)/dx at one column from its logit z; `own` adds up the
// coefficients of the entries whose target it is.
template <bool PLAIN>
__device__ __forceinline__ float gradient(const Transform<PLAIN>& t, const RowStats& s, const Slope& c,
                                          float z, float own) {
  const float lp = s.lse.log_prob(z), p = expf(lp);
  return t.slope(z) * fmaf(-p, fmaf(c.entropy, fmaxf(lp, FLOOR) + s.entropy, c.logprobs), own);
}

template <Mode MODE, bool ON_CHIP, bool PLAIN, class Out>
__global__ void __launch_bounds__(MAX_THREADS, 2) row_kernel(const __grid_constant__ Job job) {
  extern __shared__ float4 on_chip[];
  __shared__ RowStats shared_stats;
  __shared__ Slope shared_slope;
  const Cluster cluster;
  const Rows& rows = job.rows;
  const int64_t row = blockIdx.x / cluster.size();
  const Slice slice = slice_of(rows.vocab, cluster);
  const float* const x = static_cast<const float*>(rows.logits) + row * rows.stride;
  const Transform<PLAIN> t(rows, row, false);
  const int lead = lead_of(x + slice.begin);
  // kept[j] is column j's logit
  float* const kept = reinterpret_cast<float*>(on_chip + 1) - (slice.begin + lead);

  if (MODE == GRAD) {
    if (threadIdx.x == 0)
      shared_stats = {0,
                      {at(job.coefs.lse, row, 0.0f), at(job.coefs.lse_low, row, 0.0f)},
                      at(job.coefs.row_entropy, row, 0.0f),
                      0,
                      0};
    __syncthreads();
  } else {
    Sums sums = Sums::nothing();
    for_columns<4, 4>(slice, lead, [&](int64_t j, int64_t step, auto width, auto count) {
      constexpr int N = decltype(width)::value, U = decltype(count)::value;
      float z[N * U];
#pragma unroll
      for (int u = 0; u < U; u++) load<N>(x + j + u * step, z + u * N, true);
#pragma unroll
      for (int i = 0; i < N * U; i++) z[i] = t(z[i], j + i / N * step + i % N);
#pragma unroll
      for (int u = 0; u < U; u++)
        if (ON_CHIP) keep<N>(kept + j + u * step, z + u * N);
      sums.add(z);
    });
    sums = row_sum(cluster, sums);
    if (MODE == STATS && threadIdx.x == 0 && cluster.rank() == 0) store_sums(job, row, sums);
    if (threadIdx.x == 0) shared_stats = finish(sums, rows.vocab);
    cluster.sync();
  }
  const RowStats& s = shared_stats;  // not a copy: its registers would be live across the sweeps
  const bool first = cluster.rank() == 0;
  if (MODE != GRAD && first && threadIdx.x == 0) {
    put(job.stats.lse, row, s.lse.high);
    put(job.stats.lse_low, row, s.lse.low);
    put(job.stats.entropy, row, s.entropy);
    put(job.stats.mean_logits, row, s.mean);
    put(job.stats.log_sum_sq, row, s.log_sum_sq);
  }

  // The row's entries; every block of a cluster adds up the same coefficients in the same order.
  const Span entries = rows.row_ptr ? Span{rows.row_ptr[row], rows.row_ptr[row + 1]} : Span{row, row + 1};
  const Transform<PLAIN> to_z(rows, row, MODE == GRAD && !job.raw);  // of what lies in x
  const auto entry = [&](int64_t k, bool write) {
    const int64_t y = rows.targets[k];
    // a target outside the vocabulary must not hide
    const float z = y < 0 ? 0.0f : y < rows.vocab ? to_z(x[y], y) : NAN;
    if (MODE == STATS && write) put(job.at_target, k, y >= 0 && y < rows.vocab ? z : -INFINITY);
    return evaluate<MODE>(job, s, k, y < 0, z, write);
  };
  if (warp() == 0) {
    float coefs = 0, weights = 0;
    bool any = false;
    for (int64_t k = entries.begin + lane(); k < entries.end; k += WARP) {
      const Entry e = entry(k, first);
      coefs += e.coef, weights += e.weight, any |= e.coef != 0;
    }
    if (MODE != STATS) {
      const PolicyParams& p = job.policy.params;
      coefs = warp_sum(coefs), weights = warp_sum(weights), any = __any_sync(ALL_LANES, any);
      const float lse = MODE == POLICY ? -float(2 * p.z_loss_coef) * weights * s.lse.high
                                       : -at(job.coefs.row_lse, row, 0.0f);
      const float entropy =
          MODE == POLICY ? -float(p.entropy_coef) * weights : at(job.coefs.entropy, row, 0.0f);
      if (lane() == 0) {
        shared_slope = {coefs + lse, entropy, any || lse != 0 || entropy != 0};
        if (first && job.live) job.live[row] = shared_slope.live;
      }
    }
  }
  if (MODE == STATS || !job.out) return;
  __syncthreads();

  const Slope c = shared_slope;
  const RowStats near = {0, s.lse, s.entropy, 0, 0};
  Out* const out = static_cast<Out*>(job.out) + row * job.out_stride;
  const float* const source = ON_CHIP ? kept : x;
  const int out_lead = lead_of(out + slice.begin);
  const bool aligned = lead_of(source + slice.begin + out_lead) == 0;
  for_columns<16 / sizeof(Out), ON_CHIP || !PLAIN ? 1 : 2>(
      slice, out_lead, [&](int64_t j, int64_t step, auto width, auto count) {
        constexpr int N = decltype(width)::value, U = decltype(count)::value;
        float g[N * U] = {};
        if (c.live) {
#pragma unroll
          for (int u = 0; u < U; u++) load<N>(source + j + u * step, g + u * N, aligned);
#pragma unroll
          for (int i = 0; i < N * U; i++)
            g[i] = gradient(t, near, c, ON_CHIP ? g[i] : to_z(g[i], j + i / N * step + i % N), 0.0f);
        }
#pragma unroll
        for (int u = 0; u < U; u++) store<N>(out + j + u * step, g + u * N);
      });
  if (!c.live) return;
  __syncthreads();

  // The columns of targets once more, by the block whose slice they are in;
  // entries of one target add up in their order.
  for (int64_t k = entries.begin + threadIdx.x; k < entries.end; k += blockDim.x) {
    const int64_t y = rows.targets[k];
    if (y < slice.begin || y >= slice.end) continue;
    bool earlier = false;
    for (int64_t i = entries.begin; i < k; i++) earlier |= rows.targets[i] == y;
    if (earlier) continue;
    float own = 0;
    for (int64_t i = k; i < entries.end; i++)
      if (rows.targets[i] == y) own += entry(i, false).coef;
    out[y] = narrow(gradient(t, near, c, to_z(x[y], y), own), Out());
  }
}

// ---- host

template <Mode MODE, bool ON_CHIP, class Out>
cudaError_t launch(const Job& job, const Launch& how, cudaStream_t stream) {
  const bool plain = !job.rows.bias && job.rows.softcap == 0;
  const auto kernel = plain ? row_kernel<MODE, ON_CHIP, true, Out> : row_kernel<MODE, ON_CHIP, false, Out>;
  return start(kernel, job, job.rows.rows, how,
               ON_CHIP ? (columns_of(job.rows.vocab, how.cluster) + 4) * sizeof(float) : 0, stream);
}

template <Mode MODE, bool ON_CHIP>
cudaError_t launch(const Job& job, int out_type, const Launch& how, cudaStream_t stream) {
  if constexpr (MODE == STATS) return launch<MODE, false, float>(job, how, stream);
  else if (!job.out) return launch<MODE, false, float>(job, how, stream);
  else switch (out_type) {
    case FP32: return launch<MODE, ON_CHIP, float>(job, how, stream);
    case BF16: return launch<MODE, ON_CHIP, __nv_bfloat16>(job, how, stream);
    case FP16: return launch<MODE, ON_CHIP, __half>(job, how, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <Mode MODE>
int enqueue(int device, void* stream, const Job& job, int out_type, const Launch& how) {
  const Rows& r = job.rows;
  const bool output = !job.out || (job.out_stride >= r.vocab && job.out != r.logits);
  if (!takes(r, how) || !output || (r.rows && !(r.targets || r.row_ptr))) return cudaErrorInvalidValue;
  if (r.rows == 0) return cudaSuccess;
  return on_device(device, [&] {
    const auto s = static_cast<cudaStream_t>(stream);
    if constexpr (MODE == POLICY)
      if (how.on_chip) return launch<MODE, true>(job, out_type, how, s);
    return launch<MODE, false>(job, out_type, how, s);
  });
}

}  // namespace
}  // namespace drift

using namespace drift;

// Each entry enqueues on `stream` of `device` and returns a cudaError_t. Structs are those of rows.h: the
// caller compares layout().

DRIFT_EXPORT uint64_t drift_cuda_layout() { return layout(); }

DRIFT_EXPORT int drift_cuda_row_stats(int device, void* stream, const Rows* rows, const Stats* stats,
                                      int threads, int cluster) {
  Job job{*rows, *stats, {}, {}};
  return enqueue<STATS>(device, stream, job, FP32, {threads, cluster, 0});
}

DRIFT_EXPORT int drift_cuda_partial_stats(int device, void* stream, const Rows* rows, float* sums,
                                          float* at_target, int threads, int cluster) {
  Job job{*rows, {}, {}, {}};
  job.sums = sums, job.at_target = at_target;
  return enqueue<STATS>(device, stream, job, FP32, {threads, cluster, 0});
}

DRIFT_EXPORT int drift_cuda_grad_logits(int device, void* stream, const Rows* rows, const Coefs* coefs,
                                        int raw, void* out, int64_t out_stride, int out_type, uint8_t* live,
                                        int threads, int cluster) {
  Job job{*rows, {}, *coefs, {}, raw != 0, out, out_stride, live};
  return out ? enqueue<GRAD>(device, stream, job, out_type, {threads, cluster, 0}) : cudaErrorInvalidValue;
}

DRIFT_EXPORT int drift_cuda_fused_policy(int device, void* stream, const Rows* rows, const Stats* stats,
                                         const Policy* policy, void* out, int64_t out_stride, int out_type,
                                         uint8_t* live, int threads, int cluster, int on_chip) {
  Job job{*rows, *stats, {}, *policy, true, out, out_stride, live};
  return enqueue<POLICY>(device, stream, job, out_type, {threads, cluster, on_chip});
}

// How many devices there are, and of one of them: shared memory a block may have, and
// whether this build runs clusters on it.
DRIFT_EXPORT int drift_cuda_device_count(int* count) { return cudaGetDeviceCount(count); }

DRIFT_EXPORT int drift_cuda_limits(int device, int* shared_bytes, int* clusters) {
  return on_device(device, [&] {
    cudaFuncAttributes compiled;
    cudaError_t error = cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaDeviceGetAttribute(clusters, cudaDevAttrClusterLaunch, device);
    if (!error) error = cudaFuncGetAttributes(&compiled, row_kernel<STATS, false, true, float>);
    if (!error && compiled.ptxVersion < 90) *clusters = 0;
    return error;
  });
}

DRIFT_EXPORT const char* drift_cuda_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
DRIFT_EXPORT const char* drift_cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
