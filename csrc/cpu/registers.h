// What panels.h is written in, for AVX2 and AVX-512: a register `Reg` of LANES dwords, and functions of it.
//
// `load` takes the first n elements of a line, zeros behind them, and widens bf16 and fp16 to fp32. `store`
// writes the first n of a register of fp32, rounded to bf16 where it goes to bf16.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace drift {
namespace {

using dword = uint32_t;
using bf16 = uint16_t;
struct fp16 { uint16_t bits; };

// may lie beyond the end
inline __attribute__((always_inline)) void fetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

namespace avx512 {

#define INLINE __attribute__((target("avx512f,avx512bw,avx512vl"), always_inline)) inline

using Reg = __m512i;
using Sum = __m512;
constexpr int64_t LANES = 16;

INLINE Reg zero() { return _mm512_setzero_si512(); }
INLINE Reg repeat(const dword* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
INLINE Sum repeat(float x) { return _mm512_set1_ps(x); }
INLINE Reg load(const dword* p) { return _mm512_loadu_si512(p); }
INLINE void store(dword* p, Reg v) { _mm512_storeu_si512(p, v); }
INLINE void store_low(dword* p, Reg v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
}
INLINE void store_high(dword* p, Reg v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_extracti64x4_epi64(v, 1));
}

INLINE __mmask16 first(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << std::max<int64_t>(n, 0)) - 1);
}

INLINE Reg load(const float* p, int64_t n) { return _mm512_castps_si512(_mm512_maskz_loadu_ps(first(n), p)); }
INLINE Reg load(const bf16* p, int64_t n) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16);
}
INLINE Reg load(const fp16* p, int64_t n) {
  return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)));
}

INLINE Sum as_fp32(Reg v) { return _mm512_castsi512_ps(v); }
INLINE Sum multiply_add(Sum a, Sum b, Sum sum) { return _mm512_fmadd_ps(a, b, sum); }

INLINE void store(float* p, int64_t n, Sum v) { _mm512_mask_storeu_ps(p, first(n), v); }
INLINE void store(bf16* p, int64_t n, Sum sum) {  // to nearest even; a NaN stays one
  const Reg v = _mm512_castps_si512(sum);
  const Reg odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
  const Reg up = _mm512_add_epi32(v, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
  const Reg bits = _mm512_mask_or_epi32(up, nan, v, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

// halves of every block of four dwords, one of a after one of b
INLINE Reg low32(Reg a, Reg b) { return _mm512_unpacklo_epi32(a, b); }
INLINE Reg high32(Reg a, Reg b) { return _mm512_unpackhi_epi32(a, b); }
INLINE Reg low64(Reg a, Reg b) { return _mm512_unpacklo_epi64(a, b); }
INLINE Reg high64(Reg a, Reg b) { return _mm512_unpackhi_epi64(a, b); }

// of four dwords: block j of register 4j' + i goes to block j' of 4j + i
INLINE void transpose_blocks(Reg (&r)[16]) {
  Reg t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#undef INLINE

}  // namespace avx512

namespace avx2 {

#define INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline

using Reg = __m256i;
using Sum = __m256;
constexpr int64_t LANES = 8;

INLINE Reg zero() { return _mm256_setzero_si256(); }
INLINE Reg repeat(const dword* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
INLINE Sum repeat(float x) { return _mm256_set1_ps(x); }
INLINE Reg load(const dword* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE void store(dword* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
INLINE void store_low(dword* p, Reg v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v));
}
INLINE void store_high(dword* p, Reg v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_extracti128_si256(v, 1));
}

INLINE Reg first(int64_t n) {  // masked stores are slow: whole registers go without
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(n, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <class T>
INLINE __m128i load16(const T* p, int64_t n) {
  if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t some[8] = {};
  for (int64_t i = 0; i < n; i++) some[i] = reinterpret_cast<const uint16_t*>(p)[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(some));
}

INLINE Reg load(const float* p, int64_t n) {
  return _mm256_castps_si256(n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n)));
}
INLINE Reg load(const bf16* p, int64_t n) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p, n)), 16);
}
INLINE Reg load(const fp16* p, int64_t n) { return _mm256_castps_si256(_mm256_cvtph_ps(load16(p, n))); }

INLINE Sum as_fp32(Reg v) { return _mm256_castsi256_ps(v); }
INLINE Sum multiply_add(Sum a, Sum b, Sum sum) { return _mm256_fmadd_ps(a, b, sum); }

INLINE void store(float* p, int64_t n, Sum v) {
  if (n >= 8)
    _mm256_storeu_ps(p, v);
  else
    _mm256_maskstore_ps(p, first(n), v);
}
INLINE void store(bf16* p, int64_t n, Sum sum) {  // to nearest even; a NaN stays one
  const Reg v = _mm256_castps_si256(sum);
  const Reg odd = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
  const Reg up = _mm256_add_epi32(v, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Reg nan = _mm256_castps_si256(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
  const Reg bits =
      _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_or_si256(v, _mm256_set1_epi32(0x400000)), nan), 16);
  const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  if (n >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), eight);
  alignas(16) uint16_t some[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(some), eight);
  for (int64_t i = 0; i < n; i++) p[i] = some[i];
}

INLINE Reg low32(Reg a, Reg b) { return _mm256_unpacklo_epi32(a, b); }
INLINE Reg high32(Reg a, Reg b) { return _mm256_unpackhi_epi32(a, b); }
INLINE Reg low64(Reg a, Reg b) { return _mm256_unpacklo_epi64(a, b); }
INLINE Reg high64(Reg a, Reg b) { return _mm256_unpackhi_epi64(a, b); }

INLINE void transpose_blocks(Reg (&r)[8]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const Reg low = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    r[i] = low;
  }
}

#undef INLINE

}  // namespace avx2
}  // namespace
}  // namespace drift
