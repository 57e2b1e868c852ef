// 64-byte vectors of the compiler (GCC 12 or clang), lowered to whatever the machine has.
#pragma once
#include <cstdint>
#include <cstring>

namespace vectors {
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef uint16_t H32 __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef uint8_t B64 __attribute__((vector_size(64)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline F16 splat(float v) { return v - F16{}; }
inline F16 widen_bf16(const uint16_t* p) { return (F16)(__builtin_convertvector(load<H16>(p), U16) << 16); }
inline H16 round_bf16(F16 v) {  // to nearest even; a NaN stays one
  const U16 bits = (U16)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((v == v) ? rounded : (bits >> 16) | 0x40, H16);
}
inline F16 load_x(const void* x, int64_t i, int bf16) {
  return bf16 ? widen_bf16((const uint16_t*)x + i) : load<F16>((const float*)x + i);
}
template <int N, class V> inline auto half(V v) {  // the first N lanes plus the next N
  typedef float Part __attribute__((vector_size(4 * N)));
  Part parts[2];
  std::memcpy(parts, &v, sizeof parts);
  return Part(parts[0] + parts[1]);
}
inline float sum(F16 v) {
  const auto four = half<4>(half<8>(v));
  return (four[0] + four[1]) + (four[2] + four[3]);
}

constexpr int TILE = 16;  // outputs of a vector
// Outputs `channel` and the next 15 of a row of y (rows, l.n), bias added, those beyond l.n left out; the bias is as long as whole tiles.
template <class L> void write_tile(const L& l, void* y, int64_t row, int64_t channel, F16 v) {
  const int64_t left = l.n - channel, at = row * l.n + channel;
  if (left <= 0) return;
  if (l.bias) v += load<F16>(l.bias + channel);
  if (l.bf16) {
    const H16 rounded = round_bf16(v);
    std::memcpy((uint16_t*)y + at, &rounded, left < TILE ? 2 * left : 32);
  } else {
    std::memcpy((float*)y + at, &v, left < TILE ? 4 * left : 64);
  }
}
}  // namespace vectors
