// Divergence of a student's row of products from a teacher's, and its gradient: `fused_distill` of rows.h on
// fp32 products of both, gradients out of place in fp32, bf16 or fp16.
//
// A pair of rows belongs to one block or, from sm_90 on, to one cluster. The first sweep adds up the two KL
// sums and leaves on chip what the second one needs: the student's logit and the number that divergence.h
// keeps, so that the gradient costs one exp. Where that does not fit, both rows are read twice. Which
// divergence it is, is asked once a vector and not a kernel of its own. Left out: several targets a row, and
// the statistics of the rows, which `row_stats` has made before.
#include "launch.h"
#include "terms.h"

namespace drift {
namespace {

struct Job {
  Rows rows, teacher_rows;         // products of both
  Coefs coefs;
  Teacher teacher;                 // but for its logits, which are `teacher_rows`
  const int64_t* taught = nullptr;
  void* out = nullptr;             // [rows, out_stride] d(loss)/d(product of the student)
  int64_t out_stride = 0;
  uint8_t* live = nullptr;         // [rows]
};

template <Kind K>
using As = std::integral_constant<Kind, K>;

template <class F>
__device__ __forceinline__ void with(Kind kind, F&& run) {
  switch (kind) {
    case Kind::none: return run(As<Kind::none>());
    case Kind::forward: return run(As<Kind::forward>());
    case Kind::reverse: return run(As<Kind::reverse>());
    default: return run(As<Kind::mixed>());
  }
}

template <bool GRADIENT, bool ON_CHIP, class Out>
__global__ void __launch_bounds__(MAX_THREADS, 2) distill_kernel(const __grid_constant__ Job job) {
  extern __shared__ float4 on_chip[];
  const Cluster cluster;
  const Rows& rows = job.rows;
  const int64_t row = blockIdx.x / cluster.size(), other = taught_row(job.taught, row);
  if (!GRADIENT && other < 0) return;
  const Slice slice = slice_of(rows.vocab, cluster);
  const Row student(rows, row), teacher = other < 0 ? student : Row(job.teacher_rows, other);
  const Kind kind = other < 0 ? Kind::none : kind_of(job.teacher.alpha);
  const float alpha = float(job.teacher.alpha);
  const Lse<float> lse{static_cast<const float*>(job.coefs.lse)[row], at(job.coefs.lse_low, row, 0.0f)};
  Lse<float> teacher_lse{0.0f, 0.0f};
  if (other >= 0)
    teacher_lse = {static_cast<const float*>(job.teacher.lse)[other], at(job.teacher.lse_low, other, 0.0f)};
  const bool first = cluster.rank() == 0 && threadIdx.x == 0;
  const int lead = lead_of(student.x + slice.begin);
  // logits[j] is column j's
  float* const logits = reinterpret_cast<float*>(on_chip + 1) - (slice.begin + lead);
  // likewise what is kept of the teacher
  float* const kept = logits + columns_of(rows.vocab, cluster.size()) + 4;

  float student_kl = 0;
  if (ON_CHIP || other >= 0) {
    const bool aligned = lead_of(teacher.x + slice.begin) == lead;
    Totals<2> sums = Totals<2>::nothing();
    for_columns<4, ON_CHIP ? 2 : 1>(slice, lead, [&](int64_t j, int64_t step, auto width, auto count) {
      constexpr int N = decltype(width)::value, U = decltype(count)::value;
      float z[N * U], y[N * U] = {};
      student.read<N, U>(z, j, step, true);
      if (kind != Kind::none) teacher.read<N, U>(y, j, step, aligned);
      with(kind, [&](auto k) {
        Totals<2> some = Totals<2>::nothing();
#pragma unroll
        for (int i = 0; i < N * U; i++) {
          const auto both =
              contrast<decltype(k)::value, Accurate>(lse.log_prob(z[i]), teacher_lse.log_prob(y[i]), alpha);
          some.add({both.student, both.teacher});
          y[i] = both.kept;
        }
        sums.add(some);
      });
#pragma unroll
      for (int u = 0; u < U; u++)
        if (ON_CHIP) keep<N>(logits + j + u * step, z + u * N), keep<N>(kept + j + u * step, y + u * N);
    });
    sums = row_total(cluster, sums);
    student_kl = sums.of[0];
    if (first && other >= 0)
      put(job.teacher.divergence, other, divergence_of(kind, alpha, student_kl, sums.of[1]));
  }
  if (!GRADIENT) return;

  const Others others(rows, job.coefs, row);
  Terms<float> t = others.terms;
  t.teacher_lse = teacher_lse, t.alpha = alpha, t.student_kl = student_kl;
  t.weight = other < 0 ? 0.0f : at(job.teacher.weights, row, 0.0f);
  const Kind slope = t.weight != 0 ? kind : Kind::none;
  const bool live = others.any || t.weight != 0;
  if (first) job.live[row] = live;
  Out* const out = static_cast<Out*>(job.out) + row * job.out_stride;
  const int out_lead = lead_of(out + slice.begin);
  const bool aligned = lead_of((ON_CHIP ? logits : student.x) + slice.begin + out_lead) == 0;
  const bool teacher_aligned = lead_of(teacher.x + slice.begin + out_lead) == 0;
  for_columns<16 / sizeof(Out), 1>(slice, out_lead, [&](int64_t j, int64_t step, auto width, auto) {
    constexpr int N = decltype(width)::value;
    float g[N] = {};
    if (live) {
      float y[N] = {};
      if (ON_CHIP) load<N>(logits + j, g, aligned);
      else student.read<N, 1>(g, j, step, aligned);
      if (ON_CHIP) load<N>(kept + j, y, aligned);
      else if (slope != Kind::none) teacher.read<N, 1>(y, j, step, teacher_aligned);
      with(slope, [&](auto k) {
        constexpr Kind K = decltype(k)::value;
#pragma unroll
        for (int i = 0; i < N; i++) {
          const float z = g[i], log_s = t.lse.log_prob(z);
          const float of_teacher =
              ON_CHIP ? y[i] : contrast<K, Accurate>(log_s, t.teacher_lse.log_prob(y[i]), t.alpha).kept;
          const float own = static_cast<int>(j) + i == others.column ? others.target : 0.0f;
          g[i] = student.t.slope(z) * (gradient_at<K, Accurate>(log_s, of_teacher, t) + own);
        }
      });
    }
    store<N>(out + j, g);
  });
}

// ---- host

template <bool ON_CHIP>
cudaError_t launch(const Job& job, int out_type, const Launch& how, cudaStream_t stream) {
  const size_t shared = ON_CHIP ? 2 * (columns_of(job.rows.vocab, how.cluster) + 4) * sizeof(float) : 0;
  const auto run = [&](auto kernel) { return start<Job>(kernel, job, job.rows.rows, how, shared, stream); };
  switch (out_type) {
    case FP32: return run(distill_kernel<true, ON_CHIP, float>);
    case BF16: return run(distill_kernel<true, ON_CHIP, __nv_bfloat16>);
    case FP16: return run(distill_kernel<true, ON_CHIP, __half>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace drift

using namespace drift;

DRIFT_EXPORT int drift_cuda_fused_distill(int device, void* stream, const Rows* rows, const Coefs* coefs,
                                          const int64_t* taught, const Rows* teacher_rows,
                                          const Teacher* teacher, void* out, int64_t out_stride, int out_type,
                                          uint8_t* live, int threads, int cluster, int on_chip) {
  const Job job{*rows, *teacher_rows, *coefs, *teacher, taught, out, out_stride, live};
  const Launch how{threads, cluster, on_chip};
  const bool both = teacher_rows->vocab == rows->vocab && teacher_rows->stride >= rows->vocab &&
                    teacher->alpha >= 0 && teacher->alpha <= 1;
  const bool gradient =
      !teacher->gradient || (out && live && out_stride >= rows->vocab && out != rows->logits);
  if (!takes(*rows, how) || !both || !gradient || rows->row_ptr || (rows->rows && !coefs->lse))
    return cudaErrorInvalidValue;
  if (rows->rows == 0) return cudaSuccess;
  return on_device(device, [&] {
    const auto s = static_cast<cudaStream_t>(stream);
    if (!teacher->gradient)
      return start<Job>(distill_kernel<false, false, float>, job, rows->rows, how, 0, s);
    return on_chip ? launch<true>(job, out_type, how, s) : launch<false>(job, out_type, how, s);
  });
}
