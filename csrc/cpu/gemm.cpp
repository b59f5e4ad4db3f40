// After BLIS (Van Zee & van de Geijn): operands are packed into panels, and one micro-kernel holds a tile of
// C in registers. bf16 and fp16 are widened as they are packed; with AVX512-BF16 a packed dword is the pair
// (k, k + 1), as vdpbf16ps wants it.
//
// A product is three named loops (pack_a, pack_b, tiles) and the order that they run in. Blocks depend on the
// sizes alone (k = 0 is one block too) and every tile has one owner: the number of threads changes no bit.
// OpenMP regions stay outside functions with a target: an outlined body keeps the baseline's instructions.
#include "cpu/gemm.h"

#include <stdexcept>

#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/registers.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define TARGET_INLINE TARGET __attribute__((always_inline)) inline

namespace drift {
namespace {

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define STEP_OF_K 1
#include "cpu/panels.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
namespace single {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
#include "cpu/panels.h"
#undef TARGET
#undef STEP_OF_K
}  // namespace single

namespace pairs {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define STEP_OF_K 2
TARGET_INLINE Reg rounded(__m512 low, __m512 high) { return (Reg)_mm512_cvtne2ps_pbh(high, low); }
TARGET_INLINE Reg load_line(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p);
}
TARGET_INLINE Reg load_line(const float* p, int64_t n) {
  return rounded(_mm512_maskz_loadu_ps(first(n), p), _mm512_maskz_loadu_ps(first(n - 16), p + 16));
}
// Halves [one line, the next], to be paired.
TARGET_INLINE Reg two_lines(const bf16* p, const bf16* q, __mmask16 n, __mmask16 m) {
  const __m512i line = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(n, p));
  return _mm512_inserti64x4(line, _mm256_maskz_loadu_epi16(m, q), 1);
}
TARGET_INLINE Reg two_lines(const float* p, const float* q, __mmask16 n, __mmask16 m) {
  return rounded(_mm512_maskz_loadu_ps(n, p), _mm512_maskz_loadu_ps(m, q));
}
template <class T>
TARGET_INLINE Reg load_column(const T* p, int64_t stride, int64_t n, int64_t k) {
  alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __mmask16 mask = first(n);
  const Reg halves = two_lines(p, k > 1 ? p + stride : p, mask, k > 1 ? mask : 0);
  return _mm512_permutexvar_epi16(_mm512_load_si512(zip), halves);
}
TARGET_INLINE Sum multiply(Reg a, Reg b, Sum sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#include "cpu/panels.h"
#undef TARGET
#undef STEP_OF_K
}  // namespace pairs
}  // namespace avx512

using Avx2 = avx2::Panels;
using Avx512 = avx512::single::Panels;
using Pairs = avx512::pairs::Panels;

// Lines of n elements that will be packed next: fetched one by one while tiles are
// multiplied, or packing would wait for memory.
template <class T>
struct Ahead {
  const T* p;
  int64_t stride, n, lines;

  void fetch_one() {
    if (lines-- <= 0) return;
    for (int64_t i = 0; i < n; i += 64 / sizeof(T)) fetch(p + i);
    p += stride;
  }
};

constexpr int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How far a thread goes at a time with panels K, and the scratch for that.
template <class K>
struct Blocks {
  static constexpr int64_t NT = 384 * K::STEP;  // elements of k, at most
  static constexpr int64_t NN = 256 * K::STEP;
  static constexpr int64_t TN = 384 * K::STEP;
  static constexpr int64_t ROWS = 512;         // gemm_nt: rows of C whose partial sums a thread holds
  static constexpr int64_t COLUMNS = 480;      // gemm_nn: columns of B that a thread holds packed, in L2
  static constexpr int64_t BLOCK = 128;        // gemm_tn: rows of C that share a pass over the packed B
  static constexpr int64_t GROUP = 512 << 10;  // gemm_tn: bytes of packed B that stay in L2 meanwhile

  dword *shared, *first;  // first: the first thread's own
  int64_t size;           // of one thread's

  Blocks(const Gemm& g, int64_t rows, int64_t width)
      : shared(static_cast<dword*>(g.scratch)),
        first(shared + shared_dwords(rows, width)),
        size(own_dwords(rows, width)) {}

  dword* own() const {
#ifdef _OPENMP
    return first + omp_get_thread_num() * size;
#else
    return first;
#endif
  }

  static int64_t shared_dwords(int64_t rows, int64_t width) {
    return up(rows, K::MR) * up(width, K::NR) / K::STEP;
  }
  static int64_t own_dwords(int64_t rows, int64_t width) {  // grows with both
    const int64_t across = up(width, K::NR);
    const int64_t nt = K::NR * K::dwords(std::min(width, NT)) + std::min(up(rows, K::MR), ROWS) * K::NR;
    const int64_t nn = (std::min(across, COLUMNS) + K::WIDTH) * K::dwords(NN);
    const int64_t tn = BLOCK * K::dwords(std::min(rows, TN)) + BLOCK * across;
    return up(std::max({nt, nn, tn}), 16);
  }

  // k cut into blocks of at most `most`, about equally deep
  static int64_t depth(int64_t k, int64_t most) {
    const int64_t blocks = std::max<int64_t>((k + most - 1) / most, 1);
    return std::max(up((k + blocks - 1) / blocks, K::STEP), K::STEP);
  }
};

// A is packed whole; a thread takes NR rows of B at a time and keeps their partial sums by itself, since rows
// of C that lie a power of two apart would evict each other.
template <class K, class A, class B>
void nt(const Gemm& g) {
  using L = Blocks<K>;
  constexpr int64_t MR = K::MR, NR = K::NR;
  const auto* a = static_cast<const A*>(g.a);
  const auto* b = static_cast<const B*>(g.b);
  const int64_t dwords = K::dwords(g.k), deep = L::depth(g.k, L::NT), depth = K::dwords(deep);
  const L scratch(g, g.m, g.k);

  const auto pack_a = [&](int64_t i) {
    dword* panel = scratch.shared + i * dwords;
    K::template lines<MR>(a + i * g.a_stride, g.a_stride, std::min(MR, g.m - i), g.k, panel, dwords);
  };
  const auto pack_b = [&](int64_t j, int64_t k, dword* panel) {
    const int64_t columns = std::min(NR, g.n - j), kc = std::min(deep, g.k - k);
    K::template lines<NR>(b + j * g.b_stride + k, g.b_stride, columns, kc, panel, depth);
  };
  const auto packed_next = [&](int64_t j, int64_t row, int64_t k) {
    int64_t onward = j * g.b_stride + k + deep;  // the next block of k
    if (k + deep >= g.k) onward = (row + L::ROWS < g.m ? j : j + g.threads * NR) * g.b_stride;
    return Ahead<B>{b + onward, g.b_stride, deep, NR};
  };
  const auto tiles = [&](int64_t j, int64_t row, int64_t k, const dword* panel, float* partial) {
    const int64_t rows = std::min(L::ROWS, g.m - row), columns = std::min(NR, g.n - j);
    const int64_t steps = K::dwords(std::min(deep, g.k - k));
    const bool last = k + deep >= g.k;
    Ahead<B> ahead = packed_next(j, row, k);
    for (int64_t i = 0; i < rows; i += MR) {
      const dword* left = scratch.shared + (row + i) * dwords + K::dwords(k) * MR;
      float* sums = partial + i * NR;
      float* to = last ? g.c + (row + i) * g.c_stride + j : sums;
      const int64_t stride = last ? g.c_stride : NR;
      ahead.fetch_one();
      K::any_tile(left, panel, steps, rows - i, columns, 1, k ? sums : nullptr, NR, to, stride);
    }
  };

#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for
    for (int64_t i = 0; i < g.m; i += MR) pack_a(i);
    dword* panel = scratch.own();
    float* partial = reinterpret_cast<float*>(panel + NR * depth);
#pragma omp for schedule(dynamic, 1)
    for (int64_t j = 0; j < g.n; j += NR)
      for (int64_t row = 0; row < g.m; row += L::ROWS)
        for (int64_t k = 0; k == 0 || k < g.k; k += deep) {
          pack_b(j, k, panel);
          tiles(j, row, k, panel, partial);
        }
  }
}

// Threads share out C. One packs its own columns of B, and its own rows of A:
// they are cut so that least is packed.
template <class K, class A, class B>
void nn(const Gemm& g) {
  using L = Blocks<K>;
  constexpr int64_t MR = K::MR, NR = K::NR;
  const auto* a = static_cast<const A*>(g.a);
  const auto* b = static_cast<const B*>(g.b);
  if (g.m == 0 || g.n == 0) return;
  int64_t across = 1, down = g.threads;
  for (int64_t cut = 2; cut <= std::min<int64_t>(g.threads, (g.n + NR - 1) / NR); cut++) {
    const int64_t rest = g.threads / cut;
    if (g.threads % cut || cut * g.m + rest * g.n > across * g.m + down * g.n) continue;
    across = cut;
    down = rest;
  }
  const int64_t width = up((g.n + across - 1) / across, K::WIDTH), height = up((g.m + down - 1) / down, MR);
  const int64_t deep = L::depth(g.k, L::NN), depth = K::dwords(deep);
  const L scratch(g, g.m, g.n);

  const auto pack_a = [&](int64_t i, int64_t k, int64_t rows, dword* slab) {
    K::template lines<MR>(a + i * g.a_stride + k, g.a_stride, rows, std::min(deep, g.k - k), slab, depth);
    return Ahead<A>{a + (i + K::WIDTH) * g.a_stride + k, g.a_stride, deep, K::WIDTH};
  };
  const auto pack_b = [&](int64_t block, int64_t k, int64_t left, int64_t right, dword* packed) {
    const int64_t columns = std::min(L::COLUMNS, right - block), kc = std::min(deep, g.k - k);
    K::template columns<NR>(b + k * g.b_stride + block, g.b_stride, columns, kc, packed, depth);
    const int64_t next = block + L::COLUMNS;
    const int64_t onward = next < right ? k * g.b_stride + next : (k + deep) * g.b_stride + left;
    return Ahead<B>{b + onward, g.b_stride, columns, deep};
  };
  const auto tiles = [&](int64_t i, int64_t block, int64_t k, int64_t rows, int64_t columns,
                         const dword* slab, const dword* packed, Ahead<A>& next_a, Ahead<B>& next_b) {
    const int64_t steps = K::dwords(std::min(deep, g.k - k));
    for (int64_t j = 0; j < columns; j += NR)
      for (int64_t below = 0; below < rows; below += MR) {
        next_a.fetch_one();
        next_b.fetch_one();
        float* c = g.c + (i + below) * g.c_stride + block + j;
        const float* from = k ? c : nullptr;
        K::any_tile(slab + below * depth, packed + j * depth, steps, rows - below, columns - j, 1, from,
                    g.c_stride, c, g.c_stride);
      }
  };

#pragma omp parallel for num_threads(g.threads)
  for (int64_t part = 0; part < across * down; part++) {
    const int64_t left = part % across * width, right = std::min(left + width, g.n);
    const int64_t top = part / across * height, bottom = std::min(top + height, g.m);
    dword* packed = scratch.own();
    dword* slab = packed + std::min(up(g.n, NR), L::COLUMNS) * depth;
    for (int64_t k = 0; k == 0 || k < g.k; k += deep)
      for (int64_t block = left; block < right && top < bottom; block += L::COLUMNS) {
        Ahead<B> next_b = pack_b(block, k, left, right, packed);
        for (int64_t i = top; i < bottom; i += K::WIDTH) {
          const int64_t rows = std::min(K::WIDTH, bottom - i), columns = std::min(L::COLUMNS, right - block);
          Ahead<A> next_a = pack_a(i, k, rows, slab);
          tiles(i, block, k, rows, columns, slab, packed, next_a, next_b);
        }
      }
  }
}

// B is packed whole; a thread takes BLOCK rows of C at a time. If the result is bf16, sums
// between blocks of k stay with the thread.
template <class K, class A, class B>
void tn(const Gemm& g) {
  using L = Blocks<K>;
  constexpr int64_t MR = K::MR, NR = K::NR;
  const auto* a = static_cast<const A*>(g.a);
  const auto* b = static_cast<const B*>(g.b);
  auto* rounded = static_cast<bf16*>(g.rounded);
  const int64_t dwords = K::dwords(g.k), deep = L::depth(g.k, L::TN), depth = K::dwords(deep);
  const int64_t width = up(g.n, NR), wide = std::max<int64_t>(1, L::GROUP / (NR * depth * 4)) * NR;
  const L scratch(g, g.k, g.n);

  const auto pack_b = [&](int64_t j) {
    dword* panel = scratch.shared + j * dwords;
    K::template columns<NR>(b + j, g.b_stride, std::min(NR, g.n - j), g.k, panel, dwords);
  };
  const auto pack_a = [&](int64_t block, int64_t k, dword* packed) {
    const int64_t rows = std::min(L::BLOCK, g.m - block), kc = std::min(deep, g.k - k);
    K::template columns<MR>(a + k * g.a_stride + block, g.a_stride, rows, kc, packed, depth);
    const bool last = k + deep >= g.k;
    const int64_t onward = last ? block + g.threads * L::BLOCK : (k + deep) * g.a_stride + block;
    return Ahead<A>{a + onward, g.a_stride, rows, deep};
  };
  // One tile of C, at row `at`: from the sums so far, and to where the
  // next block of k or the caller finds it.
  const auto tile = [&](int64_t at, int64_t rows, int64_t j, int64_t k, const dword* left, float* sums) {
    const dword* right = scratch.shared + j * dwords + K::dwords(k) * NR;
    const int64_t steps = K::dwords(std::min(deep, g.k - k));
    float* c = g.c + at * g.c_stride + j;
    const float* from = k ? (rounded ? sums : c) : (g.accumulate ? c : nullptr);
    const int64_t stride = k && rounded ? width : g.c_stride;
    const auto add = [&](auto* to, int64_t to_stride) {
      K::any_tile(left, right, steps, rows, g.n - j, g.scale, from, stride, to, to_stride);
    };
    if (!rounded)
      add(c, g.c_stride);
    else if (k + deep < g.k)
      add(sums, width);
    else
      add(rounded + at * g.n + j, g.n);
  };
  const auto tiles = [&](int64_t block, int64_t k, const dword* packed, float* sums, Ahead<A> ahead) {
    const int64_t rows = std::min(L::BLOCK, g.m - block);
    for (int64_t group = 0; group < g.n; group += wide)
      for (int64_t i = 0; i < rows; i += MR)
        for (int64_t j = group; j < std::min(g.n, group + wide); j += NR) {
          ahead.fetch_one();
          tile(block + i, rows - i, j, k, packed + i * depth, sums + i * width + j);
        }
  };

#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for
    for (int64_t j = 0; j < g.n; j += NR) pack_b(j);
    dword* packed = scratch.own();
    float* sums = reinterpret_cast<float*>(packed + L::BLOCK * depth);
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < g.m; block += L::BLOCK)
      for (int64_t k = 0; k == 0 || k < g.k; k += deep) {
        const Ahead<A> ahead = pack_a(block, k, packed);
        tiles(block, k, packed, sums, ahead);
      }
  }
}

void check_single() {
  if (!has_gemm()) throw std::runtime_error("these products need AVX2");
}

void check_pairs(const Gemm& g) {
  if (g.type != Type::bf16 || !has_bf16_gemm())
    throw std::runtime_error("products of pairs need AVX512-BF16 and a bf16 weight");
}

// run(panels, weight) by what this CPU has and what the weight is
template <class F>
void widened(const Gemm& g, F run) {
  check_single();
  const auto by_type = [&](auto panels) {
    switch (g.type) {
      case Type::fp32: return run(panels, float());
      case Type::bf16: return run(panels, bf16());
      case Type::fp16: return run(panels, fp16());
    }
  };
  simd() == Simd::avx512 ? by_type(Avx512()) : by_type(Avx2());
}

}  // namespace

bool has_gemm() { return simd() != Simd::baseline; }  // whoever has AVX2 has F16C

bool has_bf16_gemm() { return simd() == Simd::avx512 && __builtin_cpu_supports("avx512bf16"); }

int64_t gemm_scratch_bytes(int64_t rows, int64_t width, int threads, bool pairs) {
  const auto dwords = [&](auto panels) {
    using L = Blocks<decltype(panels)>;
    return L::shared_dwords(rows, width) + threads * L::own_dwords(rows, width);
  };
  // AVX2 or AVX-512: the choice may change
  return 4 * (pairs ? dwords(Pairs()) : std::max(dwords(Avx2()), dwords(Avx512())));
}

void gemm_nt(const Gemm& g) {
  if (g.pairs) {
    check_pairs(g);
    return nt<Pairs, bf16, bf16>(g);
  }
  widened(g, [&](auto panels, auto weight) { nt<decltype(panels), float, decltype(weight)>(g); });
}

void gemm_nn(const Gemm& g) {
  if (g.pairs) {
    check_pairs(g);
    return nn<Pairs, float, bf16>(g);
  }
  widened(g, [&](auto panels, auto weight) { nn<decltype(panels), float, decltype(weight)>(g); });
}

void gemm_tn(const Gemm& g) {
  if (g.pairs) {
    check_pairs(g);
    return tn<Pairs, float, bf16>(g);
  }
  check_single();
  simd() == Simd::avx512 ? tn<Avx512, float, float>(g) : tn<Avx2, float, float>(g);
}

}  // namespace drift

#else

namespace drift {

bool has_gemm() { return false; }
bool has_bf16_gemm() { return false; }
int64_t gemm_scratch_bytes(int64_t, int64_t, int, bool) { return 0; }
void gemm_nt(const Gemm&) { throw std::runtime_error("built without products"); }
void gemm_nn(const Gemm&) { throw std::runtime_error("built without products"); }
void gemm_tn(const Gemm&) { throw std::runtime_error("built without products"); }

}  // namespace drift

#endif
