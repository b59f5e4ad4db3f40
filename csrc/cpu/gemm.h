// The three products of a language-model head, summed in fp32: C = A · B of hidden rows,
// their logits and a vocabulary's weight.
#pragma once
#include <cstdint>

namespace drift {

enum class Type { fp32, bf16, fp16 };

struct Gemm {                              // C [m, n] = A · B; strides in elements
  const void *a = nullptr, *b = nullptr;
  float* c = nullptr;
  int64_t m = 0, n = 0, k = 0, a_stride = 0, b_stride = 0, c_stride = 0;
  Type type = Type::fp32;                  // of the weight, and of the hidden rows if it is bf16 and `pairs`
  bool pairs = false;                      // multiply in bf16 (has_bf16_gemm); else the weight is widened
  bool accumulate = false;                 // gemm_tn: C += scale · A · B
  float scale = 1;                         // gemm_tn
  void* rounded = nullptr;                 // gemm_tn: bf16 [m, n], where the result goes instead of C
  int threads = 1;                         // sums do not depend on it
  void* scratch = nullptr;                 // gemm_scratch_bytes, aligned to 64
};

bool has_gemm();                           // this CPU has AVX2, and the compiler knew it
bool has_bf16_gemm();                      // and AVX512-BF16
// Enough for all three, with `rows` hidden rows of `width`, whatever the vocabulary.
int64_t gemm_scratch_bytes(int64_t rows, int64_t width, int threads, bool pairs);

void gemm_nt(const Gemm& g);               // A [m, k] (rows), B [n, k] (vocabulary): logits
void gemm_nn(const Gemm& g);               // A fp32 [m, k] (rows), B [k, n] (vocabulary): dhidden
void gemm_tn(const Gemm& g);               // A fp32 [k, m] (rows), B [k, n] (rows): dweight

}  // namespace drift
