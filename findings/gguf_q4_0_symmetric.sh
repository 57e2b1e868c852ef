#!/usr/bin/env bash
# GGUF's Q4_0 damages weights that already lie on a symmetric 4-bit grid, by more than rounding can.
#
# Versions: gguf 0.19.0, numpy 2.4.6, Python 3.11.
# Behaviour: gguf.quants.quantize maps the element of largest magnitude in a block of 32 to the code -8, whatever its sign: the step
#   is that element / -8, negative where the element is positive. Codes go from -8 to 7, so that a second extreme of the opposite sign
#   is clipped to 7/8 of its value.
# Expected: a 4-bit format that holds the codes -8..7 with one scale a block stores weights of the form code * scale, code in -7..7
#   (a usual result of symmetric quantization in groups of 32) without loss, or at least within half a step.
# Seen:
#   codes -7..7: stored scale 0.875 steps, 27 of 32 weights changed, largest error 0.875 steps
#   codes -8..7: stored scale 1.000 steps, 0 of 32 weights changed, largest error 0.000 steps
#   largest code 7, no -7: stored scale -0.875 steps
#   codes -7..7 packed by hand, scale 1 step: 0 of 32 weights changed
# Why it matters: "dequantize, then convert to Q4_0" quantizes a GPTQ, AWQ or QAT result a second time, on another grid in each
#   block that has no code -8. The codes and scales must be packed directly. Whoever reads Q4_0 must expect negative scales.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

python3 -m venv "$tmp/venv"
python="$tmp/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$python" - <<'PY'
import sys

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

Q4_0 = GGMLQuantizationType.Q4_0
STEP = np.float32(2**-7)  # a power of two: neither the float16 scale nor a product rounds


def stored(codes):
    """The stored scale in steps, and the read weights' errors in steps."""
    weights = (codes * STEP).astype(np.float32)[None]
    packed = quantize(weights, Q4_0)
    scale = packed[0, :2].view(np.float16)[0] / STEP
    return float(scale), np.abs(dequantize(packed, Q4_0) - weights)[0] / STEP


def told(name, codes):
    scale, errors = stored(codes)
    n_changed = np.count_nonzero(errors)
    print(f"{name}: stored scale {scale:.3f} steps, {n_changed} of 32 weights changed, largest error {errors.max():.3f} steps")
    return scale, errors


symmetric = np.resize(np.arange(-7, 8), 32)
scale, errors = told("codes -7..7", symmetric)
_, full_errors = told("codes -8..7", np.resize(np.arange(-8, 8), 32))
negative, _ = stored(np.maximum(symmetric, -6))
print(f"largest code 7, no -7: stored scale {negative:.3f} steps")

codes = (symmetric + 8).astype(np.uint8)  # element i in the low half of byte i, element i + 16 in its high half
by_hand = np.concatenate([np.array([STEP], np.float16).view(np.uint8), codes[:16] | codes[16:] << 4])[None]
n_changed = np.count_nonzero(dequantize(by_hand, Q4_0)[0] != symmetric * STEP)
print(f"codes -7..7 packed by hand, scale 1 step: {n_changed} of 32 weights changed")

if not (scale == 0.875 and errors.max() == 0.875 and not full_errors.any() and negative == -0.875 and n_changed == 0):
    sys.exit("changed: Q4_0 no longer stores symmetric codes as described")
PY
