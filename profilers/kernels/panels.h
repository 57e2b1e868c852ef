// Linear layers on packed 2, 3, 4 and 8 bit weights: y = act(x) @ decode(w)^T + bias, the loop and what each kind of code adds to it.
//
// One source serves every CPU: 64-byte compiler vectors (GCC and clang lower them to what the machine has), and intrinsics only
// where they decide: AVX512-VNNI and AVX2 integer dot products, and AVX512-BF16 for formats that leave activations alone.
//
// Packed weight: panels of 32 channels; a panel holds, for every group of inputs, 32 bf16 scales, 32 bf16 offsets (asymmetric only)
// and the codes. So a thread reads memory as one sequential stream. Codes come in chunks of 4, 8 or 16 inputs; a chunk has
// 64 bytes a tile of 16 channels: byte 4*channel+i holds in its bit field j the input 4*j+i. The third bit of 3-bit codes follows
// as bit planes of 8 bytes.
//
// PARTS, in templates: 0, codes are integers; otherwise they are places in a table of at most 16 levels, which the rule multiplies in
// so many parts: 1 where every level is a small integer times one unit, 2 (high and low) where it is not.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__) && !defined(ISOLATENCY_PORTABLE)
#include <immintrin.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define VNNI 1
#elif defined(__AVX2__)
#define AVX2 1
#endif
#if defined(VNNI) && defined(__AVX512BF16__)
#define BF16 1
#endif
#endif

#include "threads.h"
#include "vectors.h"

extern "C" struct Layer {  // grouped.py declares the same fields
  int64_t n, k, group, act_group;
  int32_t bits, asym, act_bits, bf16, threads;
  const uint8_t* stream;
  const float *bias, *levels;  // levels: 16 by code, or null for integers
};

void looked_up(const Layer& l, const void* x, void* y, int64_t m);  // lookup.cpp
void decode_looked_up(const Layer& l, void* out, int bf16);

namespace {
using namespace vectors;
constexpr int TILES = 2, PANEL = TILE * TILES;
constexpr int64_t AHEAD = 7168;  // bytes: the hardware prefetcher stops at pages, so ask for the stream ourselves, 100 ns and more ahead

// ---- codes
template <int BITS> struct Code {
  static constexpr int K = BITS == 8 ? 4 : BITS == 4 ? 8 : 16;  // inputs in a chunk
  static constexpr int VECTORS = K / 4, BYTES = BITS == 3 ? 96 : 64;
  // Vector j of a chunk's tile: 16 channels by 4 inputs of uint8. `high`: the tile's bit planes (3 bits).
  static inline B64 get(B64 raw, const uint8_t* high, int j) {
    if constexpr (BITS == 8) return raw;
    constexpr int WIDTH = BITS == 4 ? 4 : 2;
    const B64 low = (B64)((H32)raw >> (WIDTH * j)) & (uint8_t)((1 << WIDTH) - 1);
    if constexpr (BITS != 3) return low;
    uint64_t plane = load<uint64_t>(high + 8 * j);
#ifdef VNNI
    return (B64)_mm512_mask_add_epi8((__m512i)low, plane, (__m512i)low, _mm512_set1_epi8(4));
#else
    B64 bits;
    for (int i = 0; i < 64; i++) bits[i] = (uint8_t)((plane >> i & 1) << 2);
    return low | bits;
#endif
  }
};

inline I16 dot(I16 acc, B64 v, const int8_t* q) {  // acc[c] += sum_i v[4c+i] * q[i]
  int32_t a = load<int32_t>(q);
#ifdef VNNI
  return (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)v, _mm512_set1_epi32(a));
#elif defined(AVX2)
  // vpmaddubsw saturates at 16 bits, so an 8-bit code goes in as two nibbles.
  const __m256i x = _mm256_set1_epi32(a), nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), high = _mm256_set1_epi16(16);
  __m256i half[2];
  std::memcpy(half, &v, 64);
  for (__m256i& h : half) {
    const __m256i lo = _mm256_maddubs_epi16(_mm256_and_si256(h, nibble), x);
    const __m256i hi = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(h, 4), nibble), x);
    h = _mm256_add_epi32(_mm256_madd_epi16(lo, one), _mm256_madd_epi16(hi, high));
  }
  return acc + load<I16>(half);
#else
  for (int i = 0; i < 4; i++) acc += (I16)(((U16)v >> (8 * i)) & 255) * (int32_t)q[i];
  return acc;
#endif
}
inline F16 widen(B64 v, int i) { return __builtin_convertvector((I16)(((U16)v >> (8 * i)) & 255), F16); }
inline F16 level(B64 v, int i, const float* levels) {
  const I16 c = (I16)(((U16)v >> (8 * i)) & 255);
#ifdef VNNI
  return (F16)_mm512_permutexvar_ps((__m512i)c, _mm512_loadu_ps(levels));
#else
  F16 found;
  for (int lane = 0; lane < 16; lane++) found[lane] = levels[c[lane]];
  return found;
#endif
}
inline B64 look(B64 table, B64 codes) {  // bytes of a table of 16 that is repeated four times
#ifdef VNNI
  return (B64)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(AVX2)
  __m256i from[2], at[2];
  std::memcpy(from, &table, 64), std::memcpy(at, &codes, 64);
  for (int h = 0; h < 2; h++) at[h] = _mm256_shuffle_epi8(from[h], at[h]);
  return load<B64>(at);
#else
  B64 found;
  for (int i = 0; i < 64; i++) found[i] = table[codes[i]];
  return found;
#endif
}

// The u with every level a multiple of u that fits a signed byte, or 0 where there is none.
inline float unit_of(const float* levels) {
  for (float unit : {1.0f, 0.5f}) {
    bool fits = true;
    for (int i = 0; i < 16; i++) fits &= std::fabs(levels[i] / unit) <= 127 && levels[i] / unit == std::nearbyint(levels[i] / unit);
    if (fits) return unit;
  }
  return 0;
}

// ---- activations
template <class Body> void share_rows(const Layer& l, int64_t m, Body body) {  // a few are rounded sooner than threads are woken
  share(m, m >= 16 ? l.threads : 1, body);
}

struct Scratch {
  std::vector<int8_t> codes;      // (m, k) int8, or bf16 in the order of `Bf16Rule`
  std::vector<float> scale, sum;  // (m, activation groups); (m, groups): what a zero point or an offset multiplies
};

void quantize_row(const Layer& l, const void* x, int64_t row, int8_t* q, float* scales) {
  const int64_t size = l.act_group;
  for (int64_t a = 0; a < l.k / size; a++) {
    I16 top = {};
    for (int64_t i = a * size; i < (a + 1) * size; i += 16) {  // ordered as integers, NaN is above every number and so survives
      const I16 bits = (I16)load_x(x, row * l.k + i, l.bf16) & 0x7fffffff;
      top = bits > top ? bits : top;
    }
    int32_t most = 0;
    for (int i = 0; i < 16; i++) most = top[i] > most ? top[i] : most;
    float scale = load<float>(&most) / 127.0f;
    if (scale == 0) scale = 1;
    if (!std::isfinite(scale)) scale = NAN;
    scales[a] = scale;
    for (int64_t i = a * size; i < (a + 1) * size; i += 16) {
      const F16 v = load_x(x, row * l.k + i, l.bf16) / splat(scale);
      I16 c = (I16)(v + 12582912.0f) - 0x4B400000;  // 1.5 * 2^23: rounds half to even and leaves the integer in the mantissa
      c = c > 127 ? I16{} + 127 : c;
      c = c < -127 ? I16{} - 127 : c;
      store(q + i, __builtin_convertvector(c, B16));
    }
  }
}

void int8_row(const Layer& l, const void* x, int64_t row, Scratch& s) {
  const int64_t groups = l.k / l.group;
  int8_t* q = s.codes.data() + row * l.k;
  quantize_row(l, x, row, q, s.scale.data() + row * (l.k / l.act_group));
  for (int64_t g = 0; g < groups; g++) {
    I16 total = {};
    for (int64_t i = g * l.group; i < (g + 1) * l.group; i += 16) total += __builtin_convertvector(load<B16>(q + i), I16);
    int32_t t = 0;
    for (int i = 0; i < 16; i++) t += total[i];
    s.sum[row * groups + g] = (float)t;
  }
}

void keep_row(const Layer& l, const void* x, int64_t row, Scratch& s) {
  const int64_t groups = l.k / l.group;
  for (int64_t g = 0; g < groups; g++) {
    F16 total = {};
    for (int64_t i = g * l.group; i < (g + 1) * l.group; i += 16) total += load_x(x, row * l.k + i, l.bf16);
    s.sum[row * groups + g] = sum(total);
  }
#ifdef BF16
  if (!l.bf16) return;
  const uint16_t* from = (const uint16_t*)x + row * l.k;
  uint16_t* to = (uint16_t*)s.codes.data() + row * l.k;
  for (int64_t i = 0; i < l.k; i += 4) to[i] = from[i], to[i + 1] = from[i + 2], to[i + 2] = from[i + 1], to[i + 3] = from[i + 3];
#endif
}

// ---- rules: what a chunk of codes does to the accumulators of one row and one tile
inline float zero_of(const Layer& l) { return l.asym ? 0.0f : (float)(1 << (l.bits - 1)); }

template <int BITS, int PARTS> struct Int8Rule {  // activations int8, exact integer sums; levels as bytes, or as 16 bits in two
  static constexpr int SUMS = PARTS == 2 ? 2 : 1, MOST = PARTS == 2 ? 4 : 8;
  struct Acc { I16 part[SUMS]; };
  const int8_t* q; int64_t k; float zero, unit = 1; B64 table[SUMS];
  Int8Rule(const Layer& l, const void*, const Scratch& s) : q(s.codes.data()), k(l.k), zero(PARTS ? 128 : zero_of(l)) {
    if constexpr (PARTS > 0) {
      float top = 0;
      for (int i = 0; i < 16; i++) top = std::fmax(top, std::fabs(l.levels[i]));
      unit = PARTS == 1 ? unit_of(l.levels) : top / 32767;
      for (int i = 0; i < 64; i++) {
        const int32_t v = (int32_t)std::nearbyint(l.levels[i % 16] / unit);
        table[0][i] = (uint8_t)((PARTS == 1 ? v : v >> 8) + 128);
        if constexpr (PARTS == 2) table[1][i] = (uint8_t)(v & 255);
      }
    }
  }
  template <int MB> inline void chunk(Acc (*acc)[TILES], const B64* raw, const uint8_t* high, int64_t row, int64_t i) const {
    for (int j = 0; j < Code<BITS>::VECTORS; j++)
      for (int t = 0; t < TILES; t++) {
        const B64 code = Code<BITS>::get(raw[t], high + 32 * t, j);
        for (int p = 0; p < SUMS; p++) {
          const B64 v = PARTS ? look(table[p], code) : code;
          for (int m = 0; m < MB; m++) acc[m][t].part[p] = dot(acc[m][t].part[p], v, q + (row + m) * k + i + 4 * j);
        }
      }
  }
  inline F16 real(const Acc& a, float x_sum) const {
    F16 sum = __builtin_convertvector(a.part[0], F16) - zero * x_sum;
    if constexpr (PARTS == 2) sum = sum * 256.0f + __builtin_convertvector(a.part[1], F16);
    return PARTS ? sum * unit : sum;
  }
};

template <int BITS, int PARTS> struct FloatRule {  // activations as they are, fp32 sums
  using Acc = F16;
  static constexpr int MOST = 8;
  const void* x; int64_t k; int bf16; float zero; const float* levels;
  FloatRule(const Layer& l, const void* x_, const Scratch&) : x(x_), k(l.k), bf16(l.bf16), zero(zero_of(l)), levels(l.levels) {}
  template <int MB> inline void chunk(Acc (*acc)[TILES], const B64* raw, const uint8_t* high, int64_t row, int64_t i) const {
    for (int j = 0; j < Code<BITS>::VECTORS; j++)
      for (int t = 0; t < TILES; t++) {
        const B64 v = Code<BITS>::get(raw[t], high + 32 * t, j);
        for (int e = 0; e < 4; e++) {
          const F16 w = PARTS ? level(v, e, levels) : widen(v, e);
          for (int m = 0; m < MB; m++) {
            const int64_t at = (row + m) * k + i + 4 * j + e;
            uint32_t bits = bf16 ? (uint32_t)((const uint16_t*)x)[at] << 16 : ((const uint32_t*)x)[at];
            acc[m][t] += w * load<float>(&bits);
          }
        }
      }
  }
  inline F16 real(const Acc& a, float x_sum) const { return PARTS ? a : a - zero * x_sum; }
};

#ifdef BF16
inline float nearest_bf16(float v) {
  const uint32_t bits = (uint32_t)round_bf16(splat(v))[0] << 16;
  return load<float>(&bits);
}

template <int BITS, int PARTS> struct Bf16Rule {  // bf16 activations: codes become bf16 by look-up, pairs are multiplied and added in fp32
  using Acc = F16;
  static constexpr int MOST = 8;
  const uint16_t* x; int64_t k; float zero; __m512i table[2];
  Bf16Rule(const Layer& l, const void*, const Scratch& s) : x((const uint16_t*)s.codes.data()), k(l.k), zero(zero_of(l)) {
    // Look-ups read 5 bits of an index, so a table repeated over 32 entries needs no mask. 8 bits: low and high nibble, added.
    // A level that is no bf16 number is the sum of two.
    constexpr int LEVELS = BITS == 8 ? 16 : 1 << BITS;
    uint16_t rows[2][32];
    for (int i = 0; i < 32; i++)
      for (int h = 0; h < 2; h++) {
        float value = (float)(i % LEVELS) * (h ? 16.0f : 1.0f);
        if (PARTS) value = h ? l.levels[i % LEVELS] - nearest_bf16(l.levels[i % LEVELS]) : nearest_bf16(l.levels[i % LEVELS]);
        rows[h][i] = (uint16_t)round_bf16(splat(value))[0];
      }
    for (int h = 0; h < 2; h++) table[h] = _mm512_loadu_si512(rows[h]);
  }
  template <int MB> inline void chunk(Acc (*acc)[TILES], const B64* raw, const uint8_t* high, int64_t row, int64_t i) const {
    constexpr int VECTORS = BITS == 3 || BITS == 2 ? 8 : 4;
    for (int v = 0; v < VECTORS; v++) {
      // `odd`: inputs 1 and 3 of four, the upper byte of each 16-bit lane; `keep_row` orders x the same way.
      const int odd = v / (VECTORS / 2), field = v % (VECTORS / 2), j = BITS == 8 ? 0 : field;
      for (int t = 0; t < TILES; t++) {
        const __m512i word = BITS == 3 ? (__m512i)Code<3>::get(raw[t], high + 32 * t, j) : (__m512i)raw[t];
        const int shift = 8 * odd + (BITS == 3 ? 0 : BITS == 2 ? 2 * field : 4 * field);
        const __m512i index = _mm512_srli_epi16(word, shift);
        for (int p = 0; p < (PARTS == 2 ? 2 : 1); p++) {
          const __m512i w = _mm512_permutexvar_epi16(index, table[BITS == 8 ? field : p]);
          for (int m = 0; m < MB; m++) {
            const __m512i pair = _mm512_set1_epi32(load<int32_t>(x + (row + m) * k + i + 4 * j + 2 * odd));
            acc[m][t] = (F16)_mm512_dpbf16_ps((__m512)acc[m][t], (__m512bh)w, (__m512bh)pair);
          }
        }
      }
    }
  }
  inline F16 real(const Acc& a, float x_sum) const { return PARTS ? a : a - zero * x_sum; }
};
#endif

// ---- the loop: MB rows by one panel
int64_t panel_bytes(const Layer& l) {
  return l.k / l.group * PANEL * (l.asym ? 4 : 2) + l.k * PANEL * l.bits / 8;
}

template <int BITS, class Rule, int MB>
inline void block(const Layer& l, const Rule& rule, const Scratch& s, int64_t panel, int64_t row, void* y) {
  const int64_t groups = l.k / l.group, act_groups = l.act_bits == 8 ? l.k / l.act_group : 0;
  const uint8_t* at = l.stream + panel * panel_bytes(l);
  F16 total[MB][TILES] = {};
  for (int64_t g = 0; g < groups; g++) {
    const uint16_t *scale = (const uint16_t*)at, *offset = scale + PANEL;
    for (int64_t i = 0; i < PANEL * (l.asym ? 4 : 2); i += 64) __builtin_prefetch(at + i + AHEAD);
    at += PANEL * (l.asym ? 4 : 2);
    typename Rule::Acc acc[MB][TILES] = {};
    for (int64_t i = 0; i < l.group; i += Code<BITS>::K, at += TILES * Code<BITS>::BYTES) {
      B64 raw[TILES];
      for (int t = 0; t < TILES; t++) {
        raw[t] = load<B64>(at + 64 * t);
        __builtin_prefetch(at + 64 * t + AHEAD);
      }
      rule.template chunk<MB>(acc, raw, at + 64 * TILES, row, g * l.group + i);
    }
    for (int t = 0; t < TILES; t++) {
      const F16 w_scale = widen_bf16(scale + TILE * t);
      for (int m = 0; m < MB; m++) {
        const float a = act_groups ? s.scale[(row + m) * act_groups + (act_groups > 1 ? g : 0)] : 1.0f;
        const float x_sum = s.sum[(row + m) * groups + g];
        total[m][t] += (w_scale * a) * rule.real(acc[m][t], x_sum);
        if (l.asym) total[m][t] += widen_bf16(offset + TILE * t) * (a * x_sum);
      }
    }
  }
  for (int m = 0; m < MB; m++)
    for (int t = 0; t < TILES; t++) write_tile(l, y, row + m, panel * PANEL + TILE * t, total[m][t]);
}

template <int BITS, class Rule> void multiply(const Layer& l, const void* x, const Scratch& s, void* y, int64_t m) {
  const Rule rule(l, x, s);
  share((l.n + PANEL - 1) / PANEL, l.threads, [&](int64_t p) __attribute__((noinline)) {
    int64_t row = 0;
    for (; row + Rule::MOST <= m; row += Rule::MOST) block<BITS, Rule, Rule::MOST>(l, rule, s, p, row, y);
    if (row + 4 <= m) block<BITS, Rule, 4>(l, rule, s, p, row, y), row += 4;
    if (row + 2 <= m) block<BITS, Rule, 2>(l, rule, s, p, row, y), row += 2;
    if (row < m) block<BITS, Rule, 1>(l, rule, s, p, row, y);
  });
}

template <int BITS, int PARTS> void run(const Layer& l, const void* x, void* y, int64_t m) {
  static thread_local Scratch s;
  for (int64_t ahead = 0; ahead < AHEAD; ahead += 64) __builtin_prefetch(l.stream + ahead);  // while activations are rounded
  const bool int8 = l.act_bits == 8;
  const size_t code_bytes = m * l.k * (int8 ? 1 : 2);
  if (s.codes.size() < code_bytes) s.codes.resize(code_bytes);
  if (s.sum.size() < (size_t)(m * l.k / l.group)) s.sum.resize(m * l.k / l.group);
  if (int8 && s.scale.size() < (size_t)(m * l.k / l.act_group)) s.scale.resize(m * l.k / l.act_group);
  Scratch& shared = s;
  share_rows(l, m, [&](int64_t row) { int8 ? int8_row(l, x, row, shared) : keep_row(l, x, row, shared); });
  if (int8) return multiply<BITS, Int8Rule<BITS, PARTS>>(l, x, s, y, m);
#ifdef BF16
  if (l.bf16) return multiply<BITS, Bf16Rule<BITS, PARTS>>(l, x, s, y, m);
#endif
  multiply<BITS, FloatRule<BITS, PARTS ? 1 : 0>>(l, x, s, y, m);
}

template <int BITS, int PARTS> void decode_panel(const Layer& l, int64_t panel, void* out, int bf16) {
  const int64_t width = (l.n + PANEL - 1) / PANEL * PANEL;
  const uint8_t* at = l.stream + panel * panel_bytes(l);
  const float zero = zero_of(l);
  for (int64_t g = 0; g < l.k / l.group; g++) {
    const uint16_t *scale = (const uint16_t*)at, *offset = scale + PANEL;
    at += PANEL * (l.asym ? 4 : 2);
    for (int64_t i = g * l.group; i < (g + 1) * l.group; i += Code<BITS>::K, at += TILES * Code<BITS>::BYTES)
      for (int t = 0; t < TILES; t++) {
        const F16 by = widen_bf16(scale + TILE * t), plus = l.asym ? widen_bf16(offset + TILE * t) : F16{};
        for (int j = 0; j < Code<BITS>::VECTORS; j++)
          for (int e = 0; e < 4; e++) {
            const B64 codes = Code<BITS>::get(load<B64>(at + 64 * t), at + 64 * TILES + 32 * t, j);
            const F16 value = PARTS ? level(codes, e, l.levels) : widen(codes, e) - zero;
            const F16 w = l.asym ? value * by + plus : value * by;
            const int64_t to = (i + 4 * j + e) * width + panel * PANEL + TILE * t;
            bf16 ? store((uint16_t*)out + to, round_bf16(w)) : store((float*)out + to, w);
          }
      }
  }
}

template <int BITS, int PARTS> void decode(const Layer& l, void* out, int bf16) {
  share((l.n + PANEL - 1) / PANEL, l.threads, [&](int64_t p) __attribute__((noinline)) { decode_panel<BITS, PARTS>(l, p, out, bf16); });
}
}  // namespace
