#!/usr/bin/env bash
# safetensors 0.8.0 writes a transposed numpy array in the wrong order, without an error; 0.7.0 wrote it right.
#
# Versions: safetensors 0.8.0 and 0.7.0, numpy 2.4.6, Python 3.11.
# Behaviour: safetensors.numpy.save and save_file store the memory of an array as it lies, under the shape that the array shows.
#   A transposed view (or any array in Fortran order) comes back with its values in other places.
# Expected: what 0.7.0 does, which went through tobytes() and so wrote the elements in C order; or, as safetensors.torch does
#   for a tensor that is not contiguous, an error.
# Seen:
#   safetensors 0.7.0: saved [[0, 3], [1, 4], [2, 5]], read [[0, 3], [1, 4], [2, 5]]
#   safetensors 0.8.0: saved [[0, 3], [1, 4], [2, 5]], read [[0, 1], [2, 3], [4, 5]]
# Why it matters: weights are transposed all the time (GPT-2's Conv1D, packed layouts that store [in, out], factors of an SVD).
#   Shape, type and file size are right, so that a loader accepts the file; only the quality of the model shows the damage.
#   np.ascontiguousarray before saving is right in both versions.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

cat >"$tmp/transposed.py" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
read = load(save({"weight": weight.T}))["weight"]
copied = load(save({"weight": np.ascontiguousarray(weight.T)}))["weight"]


def shown(array):
    return array.astype(int).tolist()


print(f"safetensors {safetensors.__version__}: saved {shown(weight.T)}, read {shown(read)}")
expected = {"right": weight.T, "wrong": weight.reshape(3, 2)}[sys.argv[1]]
if not (np.array_equal(read, expected) and np.array_equal(copied, weight.T)):
    sys.exit("changed: the transposed array is no longer read back as described")
PY

python3 -m venv "$tmp/venv"
python="$tmp/venv/bin/python"
for case in 0.7.0:right 0.8.0:wrong; do
  "$python" -m pip install --quiet --disable-pip-version-check "safetensors==${case%:*}" numpy==2.4.6
  "$python" "$tmp/transposed.py" "${case#*:}"
done
