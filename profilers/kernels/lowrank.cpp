// Linear layers of low rank, y = (x @ down^T) @ up^T + bias, in one call: what is between the two products never leaves the cache.
//
// Both factors are packed in tiles of 16 outputs: bf16 with the two inputs of a pair next to each other, fp32 input after input, so
// that a tile is one sequential stream. Outputs are padded to whole tiles, inputs to whole tiles too.
#include <type_traits>
#include <vector>
#if defined(__AVX512BF16__) && !defined(ISOLATENCY_PORTABLE)
#include <immintrin.h>
#define BF16 1
#endif

#include "threads.h"
#include "vectors.h"

extern "C" struct Factors {  // low_rank.py declares the same fields
  int64_t n, k, rank;              // rank: a multiple of 16
  int32_t narrow, bf16, threads;  // narrow: weights and what is between the products are bf16, fp32 otherwise; bf16: x and y are
  const void *down, *up;
  const float* bias;
};

namespace {
using namespace vectors;

struct Narrow {  // bf16 by pairs, sums in fp32
  using Number = uint16_t;
  static constexpr int STEP = 2;  // inputs that are multiplied together
  static inline F16 add(F16 acc, const Number* w, const Number* x) {
#ifdef BF16
    return (F16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(load<int32_t>(x)));
#else
    const U16 pairs = load<U16>(w);
    const uint32_t x0 = (uint32_t)x[0] << 16, x1 = (uint32_t)x[1] << 16;
    return acc + (F16)(pairs << 16) * load<float>(&x0) + (F16)(pairs & 0xffff0000u) * load<float>(&x1);
#endif
  }
  static inline void keep(Number* to, F16 v) { store(to, round_bf16(v)); }
};

struct Wide {  // fp32
  using Number = float;
  static constexpr int STEP = 1;
  static inline F16 add(F16 acc, const Number* w, const Number* x) { return acc + load<F16>(w) * *x; }
  static inline void keep(Number* to, F16 v) { store(to, v); }
};

// MB rows of x times one tile (16, k): several sums for few rows, whose additions would wait for each other.
template <class T, int MB> inline void product(const typename T::Number* w, const typename T::Number* x, int64_t k, F16* out) {
  constexpr int CHAINS = MB <= 4 ? 4 / MB : 1, STEP = T::STEP * CHAINS;
  F16 acc[MB][CHAINS] = {};
  for (int64_t i = 0; i < k; i += STEP)
    for (int c = 0; c < CHAINS; c++)
      for (int m = 0; m < MB; m++) acc[m][c] = T::add(acc[m][c], w + (i + c * T::STEP) * TILE, x + m * k + i + c * T::STEP);
  for (int m = 0; m < MB; m++) {
    out[m] = acc[m][0];
    for (int c = 1; c < CHAINS; c++) out[m] += acc[m][c];
  }
}

// `use(row, sums)` with each of m rows of x times one tile.
template <class T, class Use> void rows(const typename T::Number* w, const typename T::Number* x, int64_t k, int64_t m, Use use) {
  F16 out[8];
  int64_t row = 0;
  auto some = [&](auto size) {
    constexpr int MB = decltype(size)::value;
    for (; row + MB <= m; row += MB) {
      product<T, MB>(w, x + row * k, k, out);
      for (int i = 0; i < MB; i++) use(row + i, out[i]);
    }
  };
  some(std::integral_constant<int, 8>());
  some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
}

template <class T> void run(const Factors& f, const typename T::Number* x, void* y, int64_t m) {
  using Number = typename T::Number;
  static thread_local std::vector<Number> scratch;
  if ((int64_t)scratch.size() < m * f.rank) scratch.resize(m * f.rank);
  Number* between = scratch.data();
  const Number *down = (const Number*)f.down, *up = (const Number*)f.up;
  share((f.rank + TILE - 1) / TILE, f.threads, [&](int64_t t) __attribute__((noinline)) {
    const int64_t r = t * TILE;
    rows<T>(down + r * f.k, x, f.k, m, [&](int64_t row, F16 v) { T::keep(between + row * f.rank + r, v); });
  });
  share((f.n + TILE - 1) / TILE, f.threads, [&](int64_t t) __attribute__((noinline)) {
    const int64_t c = t * TILE;
    rows<T>(up + c * f.rank, between, f.rank, m, [&](int64_t row, F16 v) { write_tile(f, y, row, c, v); });
  });
}
}  // namespace

// x (m, k), in all so many numbers, and y (m, n): bf16 where f->bf16, fp32 otherwise; contiguous
extern "C" void isolatency_low_rank(const Factors* f, const void* x, void* y, int64_t numbers) {
  const int64_t m = numbers / f->k;
  if (f->narrow) return run<Narrow>(*f, (const uint16_t*)x, y, m);
  if (!f->bf16) return run<Wide>(*f, (const float*)x, y, m);
  static thread_local std::vector<float> wide;
  if ((int64_t)wide.size() < m * f->k) wide.resize(m * f->k);
  for (int64_t i = 0; i < m * f->k; i += TILE) store(wide.data() + i, load_x(x, i, 1));
  run<Wide>(*f, wide.data(), y, m);
}
