// Causal attention of a whole prompt, bf16 in and out, products of bf16 pairs summed in fp32, probabilities rounded to bf16.
//
// torch multiplies bf16 attention in fp32 where the CPU has no tiles (AMX), which takes as long as all linears of a small model.
// Keys and values are packed once a key/value head; 8 queries at a time see all keys up to the last of them.
#include <cmath>
#include <vector>
#if defined(__x86_64__) && !defined(ISOLATENCY_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define PROMPT 1
#endif

#include "attention.h"

#ifdef PROMPT
namespace {
using namespace vectors;
constexpr int ROWS = 8, LANES = 16, STEP = 2 * LANES;  // queries at a time; keys of a vector; keys at a time

struct Packed {  // of one key/value head, tokens padded with zeros to a whole STEP
  std::vector<uint16_t> keys;    // [tokens / 16][dim / 2][16 tokens][2 channels]
  std::vector<uint16_t> values;  // [tokens / 2][dim][2 tokens]
};

void pack(const Attention& a, int64_t b, int64_t h, Packed& to) {
  const uint16_t *k = (const uint16_t*)a.k + b * a.k_batch + h * a.k_head, *v = (const uint16_t*)a.v + b * a.v_batch + h * a.v_head;
  const int64_t padded = (a.length + STEP - 1) / STEP * STEP;
  to.keys.assign(padded * a.dim, 0);
  to.values.assign(padded * a.dim, 0);
  for (int64_t t = 0; t < a.length; t++)
    for (int64_t c = 0; c < a.dim; c++) {
      to.keys[t / LANES * LANES * a.dim + c / 2 * 2 * LANES + t % LANES * 2 + c % 2] = k[t * a.k_token + c];
      to.values[t / 2 * 2 * a.dim + 2 * c + t % 2] = v[t * a.v_token + c];
    }
}

inline __m512 multiply(__m512 sum, __m512i vector, const uint16_t* pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)vector, (__m512bh)_mm512_set1_epi32(load<int32_t>(pair)));
}

// scores (ROWS, stride) of `rows` queries with the keys before `end`, a multiple of STEP
void score(const Attention& a, const Packed& p, const uint16_t* const* q, int64_t end, float* scores, int64_t stride) {
  for (int64_t t = 0; t < end; t += STEP) {
    __m512 sums[ROWS][2];
    for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
    const uint16_t *left = &p.keys[t * a.dim], *right = left + LANES * a.dim;
    for (int64_t c = 0; c < a.dim; c += 2) {
      const __m512i k0 = _mm512_loadu_si512(left + LANES * c), k1 = _mm512_loadu_si512(right + LANES * c);
      for (int r = 0; r < ROWS; r++) {
        sums[r][0] = multiply(sums[r][0], k0, q[r] + c);
        sums[r][1] = multiply(sums[r][1], k1, q[r] + c);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int half = 0; half < 2; half++) _mm512_storeu_ps(scores + r * stride + t + LANES * half, sums[r][half]);
  }
}

// Probabilities of a row, not yet divided by their sum, which is returned; what lies after the query itself counts nothing.
float soften(float scale, float* scores, int64_t seen, int64_t end, uint16_t* share) {
  for (int64_t t = seen; t < end; t++) scores[t] = -INFINITY;
  F16 most = F16{} - INFINITY;
  for (int64_t t = 0; t < end; t += 16) {
    const F16 score = load<F16>(scores + t);
    most = score > most ? score : most;
  }
  float top = -INFINITY;
  for (int i = 0; i < 16; i++) top = most[i] > top ? most[i] : top;
  F16 all = {};
  for (int64_t t = 0; t < end; t += 16) {
    const F16 score = load<F16>(scores + t), e = exp16((score - top) * scale), weight = score == -INFINITY ? F16{} : e;
    store(share + t, round_bf16(weight));
    all += weight;
  }
  return sum(all);
}

template <int TILES>
void mix(const Attention& a, const Packed& p, const uint16_t* share, int64_t stride, int64_t end, int64_t channel, const float* by, uint16_t* const* out) {
  __m512 sums[ROWS][TILES];
  for (auto& row : sums)
    for (auto& one : row) one = _mm512_setzero_ps();
  for (int64_t t = 0; t < end; t += 2) {
    __m512i v[TILES];
    for (int i = 0; i < TILES; i++) v[i] = _mm512_loadu_si512(&p.values[t * a.dim + 2 * (channel + LANES * i)]);
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < TILES; i++) sums[r][i] = multiply(sums[r][i], v[i], share + r * stride + t);
  }
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < TILES && out[r]; i++) store(out[r] + channel + LANES * i, round_bf16((F16)sums[r][i] * by[r]));
}

void head(const Attention& a, const Packed& p, int64_t b, int64_t h) {
  static thread_local std::vector<float> scores;
  static thread_local std::vector<uint16_t> shares;
  const int64_t stride = (a.length + STEP - 1) / STEP * STEP;
  if (scores.size() < (size_t)(ROWS * stride)) scores.resize(ROWS * stride), shares.resize(ROWS * stride);
  const uint16_t* queries = (const uint16_t*)a.q + b * a.q_batch + h * a.q_head;
  for (int64_t begin = 0; begin < a.length; begin += ROWS) {
    const int64_t last = begin + ROWS < a.length ? begin + ROWS : a.length, end = (last + STEP - 1) / STEP * STEP;
    const uint16_t* q[ROWS];
    uint16_t* out[ROWS];
    float by[ROWS];
    for (int r = 0; r < ROWS; r++) {  // rows after the last query repeat it and are not written
      const int64_t t = begin + r < last ? begin + r : last - 1;
      q[r] = queries + t * a.q_token;
      out[r] = begin + r < last ? (uint16_t*)a.out + ((b * a.length + t) * a.heads + h) * a.dim : nullptr;
    }
    score(a, p, q, end, scores.data(), stride);
    for (int r = 0; r < ROWS; r++) {
      const int64_t seen = begin + r < last ? begin + r + 1 : last;
      by[r] = 1.0f / soften((float)a.scale, scores.data() + r * stride, seen, end, shares.data() + r * stride);
    }
    int64_t c = 0;
    for (; c + STEP <= a.dim; c += STEP) mix<2>(a, p, shares.data(), stride, end, c, by, out);
    if (c < a.dim) mix<1>(a, p, shares.data(), stride, end, c, by, out);
  }
}
}  // namespace
#endif

extern "C" {
int64_t isolatency_prompt_bytes() {  // 0 where the kernel is not for this machine
#ifdef PROMPT
  return sizeof(Attention);
#else
  return 0;
#endif
}

// q (batch, heads, length, dim), k and v (batch, kv_heads, length, dim) -> out; bf16 all of them; dim a multiple of 16
void isolatency_prompt(const Attention* a) {
#ifdef PROMPT
  std::vector<Packed> packed(a->batch * a->kv_heads);
  share(a->batch * a->kv_heads, a->threads, [&](int64_t i) { pack(*a, i / a->kv_heads, i % a->kv_heads, packed[i]); });
  share(a->batch * a->heads, a->threads, [&](int64_t i) __attribute__((noinline)) {
    const int64_t b = i / a->heads, h = i % a->heads;
    head(*a, packed[b * a->kv_heads + h / (a->heads / a->kv_heads)], b, h);
  });
#else
  (void)a;
#endif
}
}
