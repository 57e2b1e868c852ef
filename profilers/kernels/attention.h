// What the attention kernels are told.
#pragma once
#include <cstdint>

#include "threads.h"
#include "vectors.h"

extern "C" struct Attention {  // attention.py declares the same fields; strides in elements, a head's channels are contiguous
  const void *q, *k, *v;
  void* out;  // (batch, query tokens, heads, dim), contiguous
  int64_t batch, heads, kv_heads, length, dim, bf16, threads;
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
  double scale;
};

namespace vectors {
inline F16 exp16(F16 x) {  // x <= 0; 2^n * 2^f with |f| <= 1/2, Taylor series to degree 6: 2e-8 relative
  const F16 y = (x < -87.0f ? F16{} - 87.0f : x) * 1.44269504f, shifted = y + 12582912.0f, f = (y - (shifted - 12582912.0f)) * 0.693147181f;
  const F16 p = 1 + f * (1 + f * (0.5f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
  return (F16)((I16)p + (((I16)shifted - 0x4B400000) << 23));
}
}  // namespace vectors
