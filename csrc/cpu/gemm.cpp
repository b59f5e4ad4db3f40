// Products on AVX512-BF16, after BLIS (Van Zee & van de Geijn): operands are packed into panels, and one micro-kernel holds
// an 8 × 48 tile of C in registers. A packed element is a dword: the pair (k, k + 1), as vdpbf16ps wants it.
//
// Blocks depend on the sizes alone (k = 0 is one block too) and every tile has one owner: the number of threads changes no bit.
// OpenMP regions stay outside functions with a target: an outlined body keeps the baseline's instructions.
#include "gemm.h"

#include "isa.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace drift {
namespace {

using bf16 = uint16_t;
using pair = uint32_t;

constexpr int64_t MR = 8, NR = 48;    // a tile of C
constexpr int64_t KC = 384;           // depth of a block: an NR × KC panel and an MR × KC one fit L1
constexpr int64_t ROWS = 512;         // gemm_nt: rows whose partial sums one thread holds
constexpr int64_t COLUMNS = 480;      // gemm_nn: columns of B that one thread holds packed, in L2
constexpr int64_t BLOCK = 128;        // gemm_tn: rows of C that share a pass over the packed B
constexpr int64_t GROUP = 512 << 10;  // gemm_tn: bytes of packed B that stay in L2 meanwhile
constexpr int64_t AHEAD = 8;          // lines of n elements fetched before they are packed

constexpr int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// bytes of one thread
constexpr int64_t NT_OWN = NR * KC * 2 + ROWS * NR * 4, NN_OWN = (COLUMNS + MR) * KC * 2;
constexpr int64_t TN_PACKED = BLOCK * KC * 2;
int64_t own_bytes(int64_t width) { return std::max({NT_OWN, NN_OWN, TN_PACKED + BLOCK * up(width, NR) * 4}); }

int64_t shared_bytes(int64_t rows, int64_t width) { return up(rows, MR) * up(width, NR) * 2; }

int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Scratch {
  pair* shared;
  char* own;
  int64_t size;
  Scratch(const Gemm& g, int64_t rows, int64_t width)
      : shared(static_cast<pair*>(g.scratch)), own(static_cast<char*>(g.scratch) + shared_bytes(rows, width)), size(own_bytes(width)) {}
  pair* mine() const { return reinterpret_cast<pair*>(own + thread() * size); }
};

INLINE __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << std::max<int64_t>(n, 0)) - 1); }

INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }  // may lie beyond the end

INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// n elements of one line, as bf16, zeros behind them
INLINE __m512i load32(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p);
}
INLINE __m512i load32(const float* p, int64_t n) {
  return rounded(_mm512_maskz_loadu_ps(first16(n), p), _mm512_maskz_loadu_ps(first16(n - 16), p + 16));
}
// n elements of two lines, one line after the other
INLINE __m512i load2x16(const bf16* p, const bf16* q, __mmask16 n, __mmask16 m) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(n, p)), _mm256_maskz_loadu_epi16(m, q), 1);
}
INLINE __m512i load2x16(const float* p, const float* q, __mmask16 n, __mmask16 m) {
  return rounded(_mm512_maskz_loadu_ps(n, p), _mm512_maskz_loadu_ps(m, q));
}

INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
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

// 16 lanes from lane `first` on, into panels of W lanes; `depth` pairs to a panel
template <int64_t W>
INLINE void put(pair* out, int64_t depth, int64_t first, int64_t lanes, int64_t p, __m512i v) {
  pair* to = out + (first / W) * depth * W + p * W + first % W;
  if (W >= 16) {
    _mm512_storeu_si512(to, v);
  } else {
    static_assert(W >= 16 || W == 8, "half a register or whole ones");
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(v));
    if (lanes > 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + depth * W), _mm512_extracti64x4_epi64(v, 1));
  }
}

// Lines of k elements, one line a lane.
template <int64_t W, class T>
TARGET void pack_lines(const T* in, int64_t stride, int64_t lines, int64_t k, pair* out, int64_t depth) {
  for (int64_t first = 0; first < lines; first += 16) {
    const int64_t lanes = std::min<int64_t>(16, lines - first);
    for (int64_t c = 0; c < k; c += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) fetch(in + (first + 16 + i) * stride + c);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) r[i] = i < lanes ? load32(in + (first + i) * stride + c, k - c) : _mm512_setzero_si512();
      transpose(r);
      const int64_t pairs = std::min<int64_t>(16, (k - c + 1) / 2);
      if (pairs == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) put<W>(out, depth, first, lanes, c / 2 + i, r[i]);
      } else {
        for (int i = 0; i < pairs; i++) put<W>(out, depth, first, lanes, c / 2 + i, r[i]);
      }
    }
  }
}

// k lines of n elements, one element a lane.
template <int64_t W, class T>
TARGET void pack_columns(const T* in, int64_t stride, int64_t n, int64_t k, pair* out, int64_t depth) {
  alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(zip);
  for (int64_t c = 0; c < k; c += 2) {
    const T *p = in + c * stride, *q = c + 1 < k ? p + stride : p;
    for (int64_t first = 0; first < n; first += 16) {
      const __mmask16 mask = first16(n - first);
      fetch(p + AHEAD * stride + first);
      fetch(q + AHEAD * stride + first);
      const __m512i v = load2x16(p + first, q + first, mask, c + 1 < k ? mask : 0);
      put<W>(out, depth, first, n - first, c / 2, _mm512_permutexvar_epi16(order, v));
    }
  }
}

INLINE void store(float* p, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }
INLINE void store(bf16* p, __mmask16 mask, __m512 v) { _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v)); }

// A tile: rows × columns of MR × 16 · V. `from` null starts at zero. The tile below is the next one, or soon to come.
template <int V, class T>
TARGET void tile(const pair* a, const pair* b, int64_t pairs, int64_t rows, int64_t columns, const float* from, int64_t from_stride, T* to,
                 int64_t to_stride) {
  __m512 sum[MR][V];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 3
    for (int j = 0; j < V; j++) {
      fetch(to + (MR + i) * to_stride + 16 * j);
      sum[i][j] = _mm512_setzero_ps();
    }
  for (int64_t p = 0; p < pairs; p++, a += MR, b += NR) {
    __m512i right[V];
#pragma GCC unroll 3
    for (int j = 0; j < V; j++) right[j] = _mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 3
      for (int j = 0; j < V; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int j = 0; j < V; j++) {
      const __mmask16 mask = first16(columns - 16 * j);
      if (from) sum[i][j] = _mm512_add_ps(sum[i][j], _mm512_maskz_loadu_ps(mask, from + i * from_stride + 16 * j));
      store(to + i * to_stride + 16 * j, mask, sum[i][j]);
    }
  }
}

template <class T>
void any_tile(const pair* a, const pair* b, int64_t pairs, int64_t rows, int64_t columns, const float* from, int64_t from_stride, T* to,
              int64_t to_stride) {
  rows = std::min(rows, MR);
  columns = std::min(columns, NR);
  const auto kernel = columns > 32 ? tile<3, T> : columns > 16 ? tile<2, T> : tile<1, T>;
  kernel(a, b, pairs, rows, columns, from, from_stride, to, to_stride);
}

}  // namespace

bool has_bf16_gemm() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  return has && simd() == Simd::avx512;
}

int64_t gemm_scratch_bytes(int64_t rows, int64_t width, int threads) { return shared_bytes(rows, width) + threads * own_bytes(width); }

// A is packed whole; a thread takes NR rows of B at a time and keeps their partial sums by itself, since rows of C that lie a
// power of two apart would evict each other.
void gemm_nt(const Gemm& g) {
  const auto *a = static_cast<const bf16*>(g.a), *b = static_cast<const bf16*>(g.b);
  const int64_t depth = (g.k + 1) / 2;
  const Scratch scratch(g, g.m, g.k);
#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for
    for (int64_t i = 0; i < g.m; i += MR)
      pack_lines<MR>(a + i * g.a_stride, g.a_stride, std::min(MR, g.m - i), g.k, scratch.shared + i * depth, depth);
    pair* panel = scratch.mine();
    float* partial = reinterpret_cast<float*>(panel + NR * KC / 2);
#pragma omp for schedule(dynamic, 4)
    for (int64_t j = 0; j < g.n; j += NR)
      for (int64_t row = 0; row < g.m; row += ROWS)
        for (int64_t k = 0; k == 0 || k < g.k; k += KC) {
          const int64_t kc = std::min(KC, g.k - k), rows = std::min(ROWS, g.m - row), columns = std::min(NR, g.n - j);
          const bool last = k + KC >= g.k;
          pack_lines<NR>(b + j * g.b_stride + k, g.b_stride, columns, kc, panel, KC / 2);
          for (int64_t i = 0; i < rows; i += MR) {
            float* sums = partial + i * NR;
            any_tile(scratch.shared + (row + i) * depth + k / 2 * MR, panel, (kc + 1) / 2, rows - i, columns, k ? sums : nullptr, NR,
                     last ? g.c + (row + i) * g.c_stride + j : sums, last ? g.c_stride : NR);
          }
        }
  }
}

// Threads share out C, by columns first: a thread packs its own columns of B, and A again (a few percent).
void gemm_nn(const Gemm& g) {
  const auto* a = static_cast<const float*>(g.a);
  const auto* b = static_cast<const bf16*>(g.b);
  if (g.n == 0) return;
  const int64_t across = std::min<int64_t>(g.threads, (g.n + NR - 1) / NR), down = g.threads / across;
  const int64_t width = up((g.n + across - 1) / across, 16), height = up((g.m + down - 1) / down, MR);
  const Scratch scratch(g, 0, 0);
#pragma omp parallel for num_threads(g.threads)
  for (int64_t part = 0; part < across * down; part++) {
    const int64_t left = part % across * width, right = std::min(left + width, g.n);
    const int64_t top = part / across * height, bottom = std::min(top + height, g.m);
    pair *packed = scratch.mine(), *slab = packed + COLUMNS * KC / 2;
    for (int64_t k = 0; k == 0 || k < g.k; k += KC)
      for (int64_t block = left; block < right && top < bottom; block += COLUMNS) {
        const int64_t kc = std::min(KC, g.k - k), columns = std::min(COLUMNS, right - block);
        pack_columns<NR>(b + k * g.b_stride + block, g.b_stride, columns, kc, packed, KC / 2);
        for (int64_t i = top; i < bottom; i += MR) {
          pack_lines<MR>(a + i * g.a_stride + k, g.a_stride, std::min(MR, bottom - i), kc, slab, KC / 2);
          for (int64_t j = 0; j < columns; j += NR) {
            float* c = g.c + i * g.c_stride + block + j;
            any_tile(slab, packed + j * KC / 2, (kc + 1) / 2, bottom - i, columns - j, k ? c : nullptr, g.c_stride, c, g.c_stride);
          }
        }
      }
  }
}

// B is packed whole; a thread takes BLOCK rows of C at a time. Where the result is bf16, sums between blocks of k stay with it.
void gemm_tn(const Gemm& g) {
  const auto* a = static_cast<const float*>(g.a);
  const auto* b = static_cast<const bf16*>(g.b);
  auto* rounded = static_cast<bf16*>(g.rounded);
  const int64_t depth = (g.k + 1) / 2, width = up(g.n, NR);
  const Scratch scratch(g, g.k, g.n);
#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for
    for (int64_t j = 0; j < g.n; j += NR)
      pack_columns<NR>(b + j, g.b_stride, std::min(NR, g.n - j), g.k, scratch.shared + j * depth, depth);
    pair* packed = scratch.mine();
    float* sums = reinterpret_cast<float*>(packed + TN_PACKED / 4);
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < g.m; block += BLOCK)
      for (int64_t k = 0; k == 0 || k < g.k; k += KC) {
        const int64_t kc = std::min(KC, g.k - k), rows = std::min(BLOCK, g.m - block);
        const bool last = k + KC >= g.k;
        pack_columns<MR>(a + k * g.a_stride + block, g.a_stride, rows, kc, packed, KC / 2);
        const int64_t wide = std::max<int64_t>(1, GROUP / (NR * std::max<int64_t>(kc, 1) * 2)) * NR;
        for (int64_t group = 0; group < g.n; group += wide)
          for (int64_t i = 0; i < rows; i += MR)
            for (int64_t j = group; j < std::min(g.n, group + wide); j += NR) {
              const pair *left = packed + i * KC / 2, *right = scratch.shared + j * depth + k / 2 * NR;
              float *c = g.c + (block + i) * g.c_stride + j, *own = sums + i * width + j;
              const float* from = k ? (rounded ? own : c) : (g.accumulate ? c : nullptr);
              const int64_t stride = k && rounded ? width : g.c_stride;
              if (!rounded)
                any_tile(left, right, (kc + 1) / 2, rows - i, g.n - j, from, stride, c, g.c_stride);
              else if (!last)
                any_tile(left, right, (kc + 1) / 2, rows - i, g.n - j, from, stride, own, width);
              else
                any_tile(left, right, (kc + 1) / 2, rows - i, g.n - j, from, stride, rounded + (block + i) * g.n + j, g.n);
            }
      }
  }
}

}  // namespace drift

#else

namespace drift {

bool has_bf16_gemm() { return false; }
int64_t gemm_scratch_bytes(int64_t, int64_t, int) { return 0; }
void gemm_nt(const Gemm&) { throw std::runtime_error("built without bf16 products"); }
void gemm_nn(const Gemm&) { throw std::runtime_error("built without bf16 products"); }
void gemm_tn(const Gemm&) { throw std::runtime_error("built without bf16 products"); }

}  // namespace drift

#endif
