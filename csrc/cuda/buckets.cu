// Distillation over some tokens of a row and the rest as one more: `top_k`, `bucket_logprobs` and
// `grad_buckets` of rows.h on fp32 products, gradients out of place in fp32, bf16 or fp16. A row is one
// block's, which reads it once.
//
// `top_k` passes over a row with the k-th best logit so far in hand and collects what is better, next to the
// k best; when the list is full it is sorted and cut to k. Logit and column are one 64-bit number, so that
// the order is strict and the result does not depend on the list's. A row in rising order, which no model
// makes, is sorted as often as the list fills up. Left out: a histogram of digits (radix select), which needs
// atomics or several readings of the row.
#include "launch.h"
#include "terms.h"

namespace drift {
namespace {

struct Job {
  Rows rows;
  Coefs coefs;
  const int64_t* taught = nullptr;
  const void* lse = nullptr;       // [rows]
  const void* lse_low = nullptr;   // [rows] or null
  Buckets buckets;
  unsigned room = 0;               // numbers that the list of top_k holds, a power of two
  void* out = nullptr;             // [rows, out_stride] d(loss)/d(product)
  int64_t out_stride = 0;
  uint8_t* live = nullptr;         // [rows]
};

// ---- the k largest

// A number that is larger for a larger logit and, between equal ones, for the
// lower column. A NaN is -inf, and -0 is 0.
__device__ __forceinline__ uint64_t rank_of(float z, int64_t column) {
  const uint32_t bits = __float_as_uint(z == z ? z + 0.0f : -INFINITY);
  const uint32_t image = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(image) << 32 | ~static_cast<uint32_t>(column);
}

// Largest first (bitonic); n is a power of two. Begins and ends with a barrier.
__device__ __forceinline__ void sort(uint64_t* list, unsigned n) {
  for (unsigned size = 2; size <= n; size *= 2)
    for (unsigned apart = size / 2; apart; apart /= 2) {
      __syncthreads();
      for (unsigned i = threadIdx.x; i < n / 2; i += blockDim.x) {
        const unsigned a = 2 * i - (i & (apart - 1)), b = a + apart;
        const uint64_t x = list[a], y = list[b];
        if ((x < y) == !(a & size)) list[a] = y, list[b] = x;
      }
    }
  __syncthreads();
}

__global__ void __launch_bounds__(MAX_THREADS, 2) top_k_kernel(const __grid_constant__ Job job) {
  extern __shared__ float4 on_chip[];
  __shared__ unsigned found[2][MAX_WARPS];
  constexpr int N = 4;
  const int64_t row = blockIdx.x, taught = taught_row(job.taught, row), V = job.rows.vocab;
  if (taught < 0) return;
  const Row logits(job.rows, row);
  uint64_t* const list = reinterpret_cast<uint64_t*>(on_chip);
  const unsigned k = static_cast<unsigned>(job.buckets.k), tile = N * blockDim.x;
  const int lead = lead_of(logits.x);
  unsigned count = 0, turn = 0;  // in the list
  uint64_t worst = 0;            // of the k best so far; 0 is less than any rank

  const auto shorten = [&] {  // sorts the list and cuts it to k
    unsigned n = 2;
    while (n < count) n *= 2;
    for (unsigned i = count + threadIdx.x; i < n; i += blockDim.x) list[i] = 0;
    sort(list, n);
    count = count < k ? count : k;
  };

  for (int64_t begin = lead ? lead - N : 0; begin < V; begin += tile, turn ^= 1) {
    const int64_t j = begin + N * static_cast<int64_t>(threadIdx.x);
    uint64_t rank[N];
    if (j >= 0 && j + N <= V) {
      float z[N];
      logits.read<N, 1>(z, j, 0, true);
#pragma unroll
      for (int i = 0; i < N; i++) rank[i] = rank_of(z[i], j + i);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) rank[i] = j + i >= 0 && j + i < V ? rank_of(logits.at(j + i), j + i) : 0;
    }
    unsigned place[N], mine = 0;  // in the list, of this warp's
#pragma unroll
    for (int i = 0; i < N; i++) {
      const unsigned better = __ballot_sync(ALL_LANES, rank[i] > worst);
      place[i] = mine + __popc(better & ((1u << lane()) - 1));
      mine += __popc(better);
    }
    if (lane() == 0) found[turn][warp()] = mine;
    __syncthreads();
    unsigned before = count;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) {
      if (w < static_cast<unsigned>(warp())) before += found[turn][w];
      count += found[turn][w];
    }
#pragma unroll
    for (int i = 0; i < N; i++)
      if (rank[i] > worst) list[before + place[i]] = rank[i];
    if (count + tile > job.room) {
      shorten();
      worst = list[k - 1];
    }
  }
  shorten();
  for (unsigned i = threadIdx.x; i < k; i += blockDim.x)
    job.buckets.ids[taught * k + i] = ~static_cast<uint32_t>(list[i]);
}

// ---- log-probs

constexpr int TILE = 16384, TILE_WORDS = TILE / 4;  // columns that are marked at a time, a byte each

// Log-sum-exp of a row without the columns of ids [k]; the products stay as they are.
__device__ Lse<float> lse_without(const Row& logits, int64_t V, const int64_t* ids, int64_t k,
                                  const Cluster& block) {
  __shared__ uint32_t words[TILE_WORDS];
  uint8_t* const marked = reinterpret_cast<uint8_t*>(words);
  Sums sums = Sums::nothing();
  for (int64_t begin = 0; begin < V; begin += TILE) {
    const Slice tile{begin, begin + TILE < V ? begin + TILE : V};
    for (int i = threadIdx.x; i < TILE_WORDS; i += blockDim.x) words[i] = 0;
    __syncthreads();
    for (int64_t a = threadIdx.x; a < k; a += blockDim.x)
      if (ids[a] >= tile.begin && ids[a] < tile.end) marked[ids[a] - begin] = 1;
    __syncthreads();
    for_columns<4, 4>(tile, lead_of(logits.x + begin), [&](int64_t j, int64_t step, auto width, auto count) {
      constexpr int N = decltype(width)::value, U = decltype(count)::value;
      float z[N * U];
      logits.read<N, U>(z, j, step, true);
#pragma unroll
      for (int i = 0; i < N * U; i++)
        if (marked[j - begin + i / N * step + i % N]) z[i] = -INFINITY;
      sums.add(z);
    });
    __syncthreads();
  }
  sums = row_total(block, sums);
  return Lse<float>::of(sums.max, log(double(sums.e)));
}

__global__ void __launch_bounds__(MAX_THREADS, 2) bucket_kernel(const __grid_constant__ Job job) {
  const Cluster block;
  const int64_t row = blockIdx.x, taught = taught_row(job.taught, row), k = job.buckets.k, V = job.rows.vocab;
  if (taught < 0) return;
  const Row logits(job.rows, row);
  const Lse<float> lse{static_cast<const float*>(job.lse)[row], at(job.lse_low, row, 0.0f)};
  const int64_t* const ids = job.buckets.ids + taught * k;
  Totals<1> kept = Totals<1>::nothing();
  for (int64_t a = threadIdx.x; a < k; a += blockDim.x) {
    // outside the vocabulary must not hide
    const float z = ids[a] >= 0 && ids[a] < V ? logits.at(ids[a]) : NAN;
    put(job.buckets.logprobs, taught * k + a, lse.at_most_0(z));
    kept.of[0] += expf(lse.log_prob(z));
  }
  if (!job.buckets.rest) return;
  kept = row_total(block, kept);
  float rest = log1pf(-kept.of[0]);
  if (kept.of[0] > 0.5f) {  // 1 - kept would cancel
    const auto others = lse_without(logits, V, ids, k, block);
    rest = (others.high - lse.high) + (others.low - lse.low);
    rest = rest > 0.0f ? 0.0f : rest;
  }
  if (threadIdx.x == 0) put(job.buckets.rest, taught, rest);
}

// ---- gradient

template <class Out>
__global__ void __launch_bounds__(MAX_THREADS, 2) grad_buckets_kernel(const __grid_constant__ Job job) {
  constexpr float HUGE_SHARE = 1e38f;
  const Cluster block;
  const int64_t row = blockIdx.x, taught = taught_row(job.taught, row), V = job.rows.vocab;
  const int64_t k = taught < 0 ? 0 : job.buckets.k;
  const Row logits(job.rows, row);
  const int64_t* const ids = job.buckets.ids + taught * k;
  const float* const dlogprobs = static_cast<const float*>(job.buckets.dlogprobs) + taught * k;
  const Others others(job.rows, job.coefs, row);
  const float drest = k ? at(job.buckets.drest, taught, 0.0f) : 0.0f;
  Totals<2> totals = Totals<2>::nothing();  // of dlogprobs, and of those that are not 0
  for (int64_t a = threadIdx.x; a < k; a += blockDim.x)
    totals.add({dlogprobs[a], dlogprobs[a] != 0 ? 1.0f : 0.0f});
  totals = row_total(block, totals);
  const bool live = others.any || drest != 0 || totals.of[1] != 0;
  if (threadIdx.x == 0) job.live[row] = live;

  Terms<float> of_ids = others.terms, of_rest = others.terms;
  of_ids.P += totals.of[0] + drest;
  of_rest.P = of_ids.P;
  // a token of the rest gets its share of drest, p / rest; drest - drest / rest in one, since it cancels
  if (drest != 0) {
    float share = expm1f(-static_cast<const float*>(job.buckets.rest)[taught]);
    share = share > HUGE_SHARE ? HUGE_SHARE : share;
    const float P = others.terms.P + totals.of[0] - drest * share;
    of_rest.P = P < -HUGE_SHARE ? -HUGE_SHARE : P > HUGE_SHARE ? HUGE_SHARE : P;
  }
  Out* const out = static_cast<Out*>(job.out) + row * job.out_stride;
  const int lead = lead_of(out);
  const bool aligned = lead_of(logits.x + lead) == 0;
  for_columns<16 / sizeof(Out), 1>({0, V}, lead, [&](int64_t j, int64_t step, auto width, auto) {
    constexpr int N = decltype(width)::value;
    float g[N] = {};
    if (live) {
      const int target = others.column - static_cast<int>(j);
      logits.read<N, 1>(g, j, step, aligned);
#pragma unroll
      for (int i = 0; i < N; i++)
        g[i] = logits.t.slope(g[i]) *
               (gradient_at<Kind::none, Accurate>(of_rest.lse.log_prob(g[i]), 0.0f, of_rest) +
                (i == target ? others.target : 0.0f));
    }
    store<N>(out + j, g);
  });
  if (!live) return;
  __syncthreads();

  for (int64_t a = threadIdx.x; a < k; a += blockDim.x) {
    if (ids[a] < 0 || ids[a] >= V) continue;
    const float z = logits.at(ids[a]), own = dlogprobs[a] + (ids[a] == others.column ? others.target : 0.0f);
    out[ids[a]] = narrow(
        logits.t.slope(z) * (gradient_at<Kind::none, Accurate>(of_ids.lse.log_prob(z), 0.0f, of_ids) + own),
        Out());
  }
}

// ---- host

int enqueue(int device, void* stream, const Job& job, int threads, bool complete, void (*kernel)(Job)) {
  const Launch how{threads, 1, 0};
  const Buckets& b = job.buckets;
  if (!takes(job.rows, how) || b.k < 0 || b.k > job.rows.vocab || !complete || job.rows.row_ptr || !kernel)
    return cudaErrorInvalidValue;
  if (job.rows.rows == 0) return cudaSuccess;
  return on_device(device, [&] {
    return start(kernel, job, job.rows.rows, how, job.room * sizeof(uint64_t),
                 static_cast<cudaStream_t>(stream));
  });
}

}  // namespace
}  // namespace drift

using namespace drift;

// `room` is a power of two, and at least k and one reading of 4 columns by each thread.
DRIFT_EXPORT int drift_cuda_top_k(int device, void* stream, const Rows* rows, const int64_t* taught,
                                  const Buckets* buckets, int room, int threads) {
  Job job{*rows, {}, taught, nullptr, nullptr, *buckets};
  job.room = static_cast<unsigned>(room);
  const bool fits =
      room > 0 && (room & (room - 1)) == 0 && buckets->k > 0 && buckets->k + 4 * threads <= room;
  return enqueue(device, stream, job, threads, fits, top_k_kernel);
}

DRIFT_EXPORT int drift_cuda_bucket_logprobs(int device, void* stream, const Rows* rows, const int64_t* taught,
                                            const void* lse, const void* lse_low, const Buckets* buckets,
                                            int threads) {
  const Job job{*rows, {}, taught, lse, lse_low, *buckets};
  return enqueue(device, stream, job, threads, rows->rows == 0 || lse, bucket_kernel);
}

DRIFT_EXPORT int drift_cuda_grad_buckets(int device, void* stream, const Rows* rows, const Coefs* coefs,
                                         const int64_t* taught, const Buckets* buckets, void* out,
                                         int64_t out_stride, int out_type, uint8_t* live, int threads) {
  const Job job{*rows, *coefs, taught, nullptr, nullptr, *buckets, 0, out, out_stride, live};
  const bool complete = rows->rows == 0 || (coefs->lse && live && out && out_stride >= rows->vocab &&
                                            out != rows->logits && (buckets->rest || !buckets->drest));
  const auto kernel = out_type == FP32   ? grad_buckets_kernel<float>
                      : out_type == BF16 ? grad_buckets_kernel<__nv_bfloat16>
                      : out_type == FP16 ? grad_buckets_kernel<__half>
                                         : nullptr;
  return enqueue(device, stream, job, threads, complete, kernel);
}
