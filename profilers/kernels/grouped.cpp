// The C ABI of packed weights, for ctypes, no library needed; panels.h has the loop. Integer codes are compiled here.
#include "panels.h"

#define BY_BITS(call) \
  switch (l->bits) { case 2: call(2); break; case 3: call(3); break; case 4: call(4); break; default: call(8); }

extern "C" {
int isolatency_isa() {
#if defined(BF16)
  return 3;
#elif defined(VNNI)
  return 2;
#elif defined(AVX2)
  return 1;
#else
  return 0;
#endif
}

int64_t isolatency_stream_bytes(const Layer* l) { return (l->n + PANEL - 1) / PANEL * panel_bytes(*l); }

// codes (n, k) uint8; scale, offset (n, k / group) bf16 -> stream, zeroed by the caller: missing channels decode to zero.
void isolatency_pack(const Layer* l, const uint8_t* codes, const uint16_t* scale, const uint16_t* offset, uint8_t* stream) {
  const int64_t groups = l->k / l->group, head = PANEL * (l->asym ? 4 : 2);
  const int width = l->bits == 3 ? 2 : l->bits, chunk = 32 / width, bytes = l->bits == 3 ? 96 : 64;
  for (int64_t c = 0; c < l->n; c++) {
    const int64_t tile = c % PANEL / TILE, lane = c % TILE * 4;
    uint8_t* at = stream + c / PANEL * panel_bytes(*l);
    for (int64_t g = 0; g < groups; g++, at += head + l->group / chunk * bytes * TILES) {
      store(at + 2 * (c % PANEL), scale[c * groups + g]);
      if (l->asym) store(at + 2 * (PANEL + c % PANEL), offset[c * groups + g]);
      for (int64_t i = 0; i < l->group; i++) {
        uint8_t* base = at + head + i / chunk * bytes * TILES;
        const int64_t j = i % chunk / 4, bit = lane + i % 4;
        const uint8_t code = codes[c * l->k + g * l->group + i];
        base[64 * tile + bit] |= (uint8_t)((code & ((1 << width) - 1)) << (width * j));
        if (l->bits == 3) base[64 * TILES + 32 * tile + 8 * j + bit / 8] |= (uint8_t)((code >> 2) << (bit % 8));
      }
    }
  }
}

// out: (k, n rounded up to a panel), bf16 or fp32
void isolatency_decode(const Layer* l, void* out, int bf16) {
  if (l->levels) return decode_looked_up(*l, out, bf16);
#define DECODE(b) decode<b, 0>(*l, out, bf16)
  BY_BITS(DECODE)
}

// x (m, k) -> q (m, k) int8 and scales (m, k / act_group) fp32
void isolatency_quantize(const Layer* l, const void* x, int8_t* q, float* scales, int64_t m) {
  share_rows(*l, m, [&](int64_t row) { quantize_row(*l, x, row, q + row * l->k, scales + row * (l->k / l->act_group)); });
}

// sums (m, n) int32 of a product of int8 codes -> y (m, n) = sums * row scale * channel scale + bias
void isolatency_rescale(const Layer* l, const int32_t* sums, const float* rows, const float* channels, void* y, int64_t m) {
  share_rows(*l, m, [&](int64_t row) {
    for (int64_t c = 0; c < l->n; c += 16) {
      I16 s = {};
      F16 by = {};
      const int64_t left = l->n - c < 16 ? l->n - c : 16;
      std::memcpy(&s, sums + row * l->n + c, 4 * left);
      std::memcpy(&by, channels + c, 4 * left);
      write_tile(*l, y, row, c, __builtin_convertvector(s, F16) * (by * rows[row]));
    }
  });
}

// x (m, k) -> out (m, k) of x's dtype: the activations as the format sees them
void isolatency_round(const Layer* l, const void* x, void* out, int64_t m) {
  share_rows(*l, m, [&](int64_t row) {
    std::vector<int8_t> q(l->k);
    std::vector<float> scales(l->k / l->act_group);
    quantize_row(*l, x, row, q.data(), scales.data());
    for (int64_t i = 0; i < l->k; i += 16) {
      const F16 v = __builtin_convertvector(load<B16>(&q[i]), F16) * scales[i / l->act_group];
      l->bf16 ? store((uint16_t*)out + row * l->k + i, round_bf16(v)) : store((float*)out + row * l->k + i, v);
    }
  });
}

// x (m, k), in all so many numbers, and y (m, n): bf16 where l->bf16, fp32 otherwise; contiguous
void isolatency_linear(const Layer* l, const void* x, void* y, int64_t numbers) {
  const int64_t m = numbers / l->k;
  if (l->levels) return looked_up(*l, x, y, m);
#define RUN(b) run<b, 0>(*l, x, y, m)
  BY_BITS(RUN)
}
}
