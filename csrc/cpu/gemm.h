// The three products of a language-model head on bf16 operands, summed in fp32: what no library offers on a CPU.
#pragma once
#include <cstdint>

namespace drift {

struct Gemm {                              // C [m, n] = A · B, plus C itself where `accumulate`; strides in elements
  const void *a = nullptr, *b = nullptr;
  float* c = nullptr;
  int64_t m = 0, n = 0, k = 0, a_stride = 0, b_stride = 0, c_stride = 0;
  bool accumulate = false;                 // read by gemm_tn alone
  void* rounded = nullptr;                 // gemm_tn: bf16 [m, n], where the result goes instead of C
  int threads = 1;                         // sums do not depend on it
  void* scratch = nullptr;                 // gemm_scratch_bytes, aligned to 64
};

bool has_bf16_gemm();                      // this CPU has AVX512-BF16, and the compiler knew it
// Enough for all three, with `rows` hidden rows of `width`, whatever the vocabulary.
int64_t gemm_scratch_bytes(int64_t rows, int64_t width, int threads);

void gemm_nt(const Gemm& g);               // A bf16 [m, k] (rows), B bf16 [n, k] (vocabulary): logits
void gemm_nn(const Gemm& g);               // A fp32 [m, k] (rows), rounded to bf16, B bf16 [k, n] (vocabulary): dhidden
void gemm_tn(const Gemm& g);               // A fp32 [k, m] (rows), rounded to bf16, B bf16 [k, n] (rows): dweight

}  // namespace drift
