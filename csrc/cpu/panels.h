// Packing and the micro-kernel. gemm.cpp includes this once for each kind of product, in a namespace that has
// registers.h's functions, with TARGET (the instruction set) and STEP_OF_K (elements of k in a packed dword).
// Where that is not 1 the namespace has its own `load_line` (the first elements of a line along k),
// `load_column` (along n; STEP_OF_K lines) and `multiply`.
//
// A panel holds W lanes for each dword of k, side by side. One micro-kernel holds an MR × NR tile of C in
// registers: 24 of AVX-512's 32, or 12 of AVX2's 16.
#if STEP_OF_K == 1
template <class T>
TARGET_INLINE Reg load_line(const T* p, int64_t n) { return load(p, n); }
template <class T>
TARGET_INLINE Reg load_column(const T* p, int64_t, int64_t n, int64_t) { return load(p, n); }
TARGET_INLINE Sum multiply(Reg a, Reg b, Sum sum) { return multiply_add(as_fp32(a), as_fp32(b), sum); }
#endif

struct Panels {
  static constexpr int64_t STEP = STEP_OF_K, WIDTH = LANES, MR = LANES / 2, NR = 3 * LANES;
  static constexpr int64_t AHEAD = 8;  // lines of n elements fetched before they are packed

  static int64_t dwords(int64_t k) { return (k + STEP - 1) / STEP; }

  // Lanes from `first` on, into panels of W lanes; `depth` dwords to a panel.
  template <int64_t W>
  TARGET_INLINE static void put(dword* out, int64_t depth, int64_t first, int64_t lanes, int64_t p, Reg v) {
    dword* to = out + first / W * depth * W + p * W + first % W;
    if (W >= LANES) {
      store(to, v);
    } else {
      static_assert(W >= LANES || W == LANES / 2, "half a register or whole ones");
      store_low(to, v);
      if (lanes > W) store_high(to + depth * W, v);
    }
  }

  // Lane j of register i and lane i of register j change places.
  TARGET_INLINE static void transpose(Reg (&r)[LANES]) {
    Reg t[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
      t[i] = low32(r[i], r[i + 1]);
      t[i + 1] = high32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
      r[i] = low64(t[i], t[i + 2]);
      r[i + 1] = high64(t[i], t[i + 2]);
      r[i + 2] = low64(t[i + 1], t[i + 3]);
      r[i + 3] = high64(t[i + 1], t[i + 3]);
    }
    transpose_blocks(r);
  }

  // Lines of k elements, one line a lane.
  template <int64_t W, class T>
  TARGET static void lines(const T* in, int64_t stride, int64_t count, int64_t k, dword* out, int64_t depth) {
    for (int64_t first = 0; first < count; first += LANES) {
      const int64_t lanes = std::min(LANES, count - first);
      for (int64_t c = 0; c < k; c += STEP * LANES) {
        Reg r[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) fetch(in + (first + LANES + i) * stride + c);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
          r[i] = i < lanes ? load_line(in + (first + i) * stride + c, k - c) : zero();
        transpose(r);
        const int64_t used = std::min(LANES, dwords(k - c));
        if (used == LANES) {
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) put<W>(out, depth, first, lanes, c / STEP + i, r[i]);
        } else {
          for (int i = 0; i < used; i++) put<W>(out, depth, first, lanes, c / STEP + i, r[i]);
        }
      }
    }
  }

  // k lines of n elements, one element a lane.
  template <int64_t W, class T>
  TARGET static void columns(const T* in, int64_t stride, int64_t n, int64_t k, dword* out, int64_t depth) {
    for (int64_t c = 0; c < k; c += STEP) {
      const T* p = in + c * stride;
      for (int64_t first = 0; first < n; first += LANES) {
#pragma GCC unroll 2
        for (int i = 0; i < STEP; i++) fetch(p + (AHEAD + i) * stride + first);
        put<W>(out, depth, first, n - first, c / STEP, load_column(p + first, stride, n - first, k - c));
      }
    }
  }

  template <class T>
  TARGET_INLINE static void finish(T* to, const float* from, int64_t n, Sum factor, Sum sum) {
    store(to, n, multiply_add(factor, sum, as_fp32(from ? load(from, n) : zero())));
  }

  // to = from + scale · A · B of a tile of rows × columns, at most MR × LANES · V; `from` null starts at
  // zero. The tile below is the next one, or soon to come.
  template <int V, class T>
  TARGET static void tile(const dword* a, const dword* b, int64_t depth, int64_t rows, int64_t columns,
                          float scale, const float* from, int64_t from_stride, T* to, int64_t to_stride) {
    Sum sum[MR][V];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 3
      for (int j = 0; j < V; j++) {
        fetch(to + (MR + i) * to_stride + LANES * j);
        sum[i][j] = as_fp32(zero());
      }
    for (int64_t p = 0; p < depth; p++, a += MR, b += NR) {
      Reg right[V];
#pragma GCC unroll 3
      for (int j = 0; j < V; j++) right[j] = load(b + LANES * j);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        const Reg left = repeat(a + i);
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) sum[i][j] = multiply(left, right[j], sum[i][j]);
      }
    }
    const Sum factor = repeat(scale);
    if (rows == MR) {
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 3
        for (int j = 0; j < V; j++)
          finish(to + i * to_stride + LANES * j, from ? from + i * from_stride + LANES * j : nullptr,
                 columns - LANES * j, factor, sum[i][j]);
      return;
    }
    alignas(64) float left[MR * V * LANES];  // so that above, sums stay in registers
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 3
      for (int j = 0; j < V; j++) store(left + (i * V + j) * LANES, LANES, sum[i][j]);
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < V; j++)
        finish(to + i * to_stride + LANES * j, from ? from + i * from_stride + LANES * j : nullptr,
               columns - LANES * j, factor, as_fp32(load(left + (i * V + j) * LANES, LANES)));
  }

  template <class T>
  static void any_tile(const dword* a, const dword* b, int64_t depth, int64_t rows, int64_t columns,
                       float scale, const float* from, int64_t from_stride, T* to, int64_t to_stride) {
    rows = std::min(rows, MR);
    columns = std::min(columns, NR);
    const auto kernel = columns > 2 * LANES ? tile<3, T> : columns > LANES ? tile<2, T> : tile<1, T>;
    kernel(a, b, depth, rows, columns, scale, from, from_stride, to, to_stride);
  }
};
