// Packed weights whose codes are places in a table of at most 16 levels: the loop of panels.h, compiled for them.
#include "panels.h"

#define BY_BITS(call) \
  switch (l.bits) { case 2: call(2); break; case 3: call(3); break; default: call(4); }

void looked_up(const Layer& l, const void* x, void* y, int64_t m) {
  const bool whole = unit_of(l.levels) > 0;
#define RUN(b) whole ? run<b, 1>(l, x, y, m) : run<b, 2>(l, x, y, m)
  BY_BITS(RUN)
}

void decode_looked_up(const Layer& l, void* out, int bf16) {
#define DECODE(b) decode<b, 1>(l, out, bf16)
  BY_BITS(DECODE)
}
