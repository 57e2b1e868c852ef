// Attention of one new token over a key/value cache: softmax(q K^T * scale) V, grouped-query heads, fp32 inside.
//
// torch's CPU kernel is made for many queries; for one it takes longer than all linears of a small model together.
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace {
using namespace vectors;

template <int CHUNKS> void head(const Attention& a, int64_t b, int64_t h, float* weights) {
  const int64_t kv = h / (a.heads / a.kv_heads);
  const int64_t q_at = b * a.q_batch + h * a.q_head, k_at = b * a.k_batch + kv * a.k_head, v_at = b * a.v_batch + kv * a.v_head;
  F16 q[CHUNKS], total[CHUNKS] = {};
  for (int c = 0; c < CHUNKS; c++) q[c] = load_x(a.q, q_at + 16 * c, a.bf16) * (float)a.scale;
  float top = -INFINITY;
  for (int64_t t = 0; t < a.length; t++) {
    F16 dot = {};
    for (int c = 0; c < CHUNKS; c++) dot += q[c] * load_x(a.k, k_at + t * a.k_token + 16 * c, a.bf16);
    weights[t] = sum(dot);
    top = weights[t] > top ? weights[t] : top;
  }
  const int64_t padded = (a.length + 15) / 16 * 16;
  for (int64_t t = a.length; t < padded; t++) weights[t] = -INFINITY;
  F16 all = {};
  for (int64_t t = 0; t < padded; t += 16) {
    const F16 score = load<F16>(weights + t) - top, e = exp16(score);
    const F16 weight = score == -INFINITY ? F16{} : e;
    store(weights + t, weight);
    all += weight;
  }
  for (int64_t t = 0; t < a.length; t++)
    for (int c = 0; c < CHUNKS; c++) total[c] += load_x(a.v, v_at + t * a.v_token + 16 * c, a.bf16) * weights[t];
  const float by = 1.0f / sum(all);
  for (int c = 0; c < CHUNKS; c++) {
    const int64_t at = (b * a.heads + h) * a.dim + 16 * c;
    a.bf16 ? store((uint16_t*)a.out + at, round_bf16(total[c] * by)) : store((float*)a.out + at, total[c] * by);
  }
}

template <int CHUNKS> void attend(const Attention& a) {
  share(a.batch * a.heads, a.threads, [&](int64_t i) __attribute__((noinline)) {
    static thread_local std::vector<float> weights;
    if (weights.size() < (size_t)a.length + 16) weights.resize(a.length + 1024);
    head<CHUNKS>(a, i / a.heads, i % a.heads, weights.data());
  });
}
}  // namespace

extern "C" void isolatency_attention(const Attention* a) {
  switch (a->dim / 16) {  // the dimensions that attention.py lists
    case 1: return attend<1>(*a);
    case 2: return attend<2>(*a);
    case 4: return attend<4>(*a);
    case 5: return attend<5>(*a);
    case 6: return attend<6>(*a);
    case 8: return attend<8>(*a);
    default: return attend<16>(*a);
  }
}
