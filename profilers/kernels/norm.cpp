// Root-mean-square norm in one pass: y = x / sqrt(mean(x^2) + eps) * gain, fp32 inside, one rounding.
#include <cmath>
#include <cstdint>

#include "vectors.h"

using namespace vectors;

// x, y (rows, dim), dim a multiple of 16; gain (dim) fp32; bf16: x and y are bf16, else fp32
extern "C" void isolatency_rms_norm(const void* x, const float* gain, void* y, int64_t rows, int64_t dim, int64_t bf16, double eps) {
  for (int64_t row = 0; row < rows; row++) {
    F16 squares = {};
    for (int64_t i = 0; i < dim; i += 16) {
      const F16 v = load_x(x, row * dim + i, bf16);
      squares += v * v;
    }
    const float by = 1.0f / std::sqrt(sum(squares) / (float)dim + (float)eps);
    for (int64_t i = 0; i < dim; i += 16) {
      const F16 v = load_x(x, row * dim + i, bf16) * by * load<F16>(gain + i);
      bf16 ? store((uint16_t*)y + row * dim + i, round_bf16(v)) : store((float*)y + row * dim + i, v);
    }
  }
}
