// Linear layers whose weight is mostly zeros: only the others are kept, row after row, each with its column (CSR).
//
// One row of x: its elements are gathered by the columns. More rows: x is transposed first, so that a weight multiplies neighbouring
// memory, 16 to 64 rows of x at a time.
#include <vector>
#if defined(__AVX512F__) && !defined(ISOLATENCY_PORTABLE)
#include <immintrin.h>
#define GATHER 1
#endif

#include "threads.h"
#include "vectors.h"

extern "C" struct Sparse {  // csr.py declares the same fields
  int64_t n, k;
  int32_t narrow, bf16, threads;  // narrow: values are bf16, fp32 otherwise; bf16: x and y are
  const uint32_t* starts;         // (n + 1) places in values and columns
  const uint16_t* columns;
  const void* values;  // 16 more of them and of the columns may be read than there are
  const float* bias;
};

namespace {
using namespace vectors;
constexpr int WIDEST = 4;  // vectors of 16 rows of x

inline float value(const Sparse& w, int64_t i) {
  const uint32_t bits = w.narrow ? (uint32_t)((const uint16_t*)w.values)[i] << 16 : ((const uint32_t*)w.values)[i];
  return load<float>(&bits);
}

float gathered(const Sparse& w, const float* x, int64_t row) {
  F16 total = {};
  const int64_t end = w.starts[row + 1];
  for (int64_t i = w.starts[row]; i < end; i += 16) {
    const I16 at = __builtin_convertvector(load<H16>(w.columns + i), I16);
    const F16 v = load_x(w.values, i, w.narrow);
#ifdef GATHER
    const __mmask16 mask = end - i >= 16 ? 0xffff : (__mmask16)((1 << (end - i)) - 1);
    const __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, (__m512i)at, x, 4);
    total = (F16)_mm512_mask3_fmadd_ps((__m512)v, found, (__m512)total, mask);
#else
    const int64_t left = end - i < 16 ? end - i : 16;
    for (int64_t lane = 0; lane < left; lane++) total[lane] += v[lane] * x[at[lane]];
#endif
  }
  return sum(total);
}

void one(const Sparse& w, const void* x, void* y) {
  static thread_local std::vector<float> scratch;
  if ((int64_t)scratch.size() < w.k) scratch.resize(w.k);
  float* wide = scratch.data();
  for (int64_t i = 0; i < w.k; i += TILE) store(wide + i, load_x(x, i, w.bf16));
  share((w.n + TILE - 1) / TILE, w.threads, [&](int64_t t) __attribute__((noinline)) {
    const int64_t c = t * TILE;
    F16 out = {};
    for (int64_t lane = 0; lane < TILE && c + lane < w.n; lane++) out[lane] = gathered(w, wide, c + lane);
    write_tile(w, y, 0, c, out);
  });
}

// Rows `row` to `row + rows` of x, at most 16 * V, which lie transposed (k, 16 * V) in xt.
template <int V> void tile(const Sparse& w, const float* xt, int64_t c, int64_t row, int64_t rows, void* y) {
  float out[16 * V][TILE] = {};
  for (int64_t lane = 0; lane < TILE && c + lane < w.n; lane++) {
    F16 total[V] = {};
    for (int64_t i = w.starts[c + lane]; i < (int64_t)w.starts[c + lane + 1]; i++) {
      const float* from = xt + (int64_t)w.columns[i] * 16 * V;
      const float by = value(w, i);
      for (int v = 0; v < V; v++) total[v] += by * load<F16>(from + 16 * v);
    }
    for (int v = 0; v < V; v++)
      for (int i = 0; i < 16; i++) out[16 * v + i][lane] = total[v][i];
  }
  for (int64_t r = 0; r < rows; r++) write_tile(w, y, row + r, c, load<F16>(out[r]));
}

template <int V> int64_t several(const Sparse& w, const void* x, int64_t row, int64_t m, float* xt, void* y) {
  const int64_t rows = m - row < 16 * V ? m - row : 16 * V;
  share((w.k + TILE - 1) / TILE, w.threads, [&](int64_t t) __attribute__((noinline)) {
    for (int64_t i = t * TILE, r = 0; r < 16 * V; r++) {
      const F16 part = r < rows ? load_x(x, (row + r) * w.k + i, w.bf16) : F16{};
      for (int j = 0; j < TILE; j++) xt[(i + j) * 16 * V + r] = part[j];
    }
  });
  share((w.n + TILE - 1) / TILE, w.threads, [&](int64_t t) __attribute__((noinline)) { tile<V>(w, xt, t * TILE, row, rows, y); });
  return row + rows;
}
}  // namespace

// x (m, k), in all so many numbers, and y (m, n): bf16 where w->bf16, fp32 otherwise; contiguous
extern "C" void isolatency_csr(const Sparse* w, const void* x, void* y, int64_t numbers) {
  const int64_t m = numbers / w->k;
  if (m == 1) return one(*w, x, y);
  static thread_local std::vector<float> scratch;
  const size_t size = w->k * 16 * WIDEST;
  if (scratch.size() < size) scratch.resize(size);
  for (int64_t row = 0; row < m;) {
    if (m - row > 32) row = several<4>(*w, x, row, m, scratch.data(), y);
    else if (m - row > 16) row = several<2>(*w, x, row, m, scratch.data(), y);
    else row = several<1>(*w, x, row, m, scratch.data(), y);
  }
}
