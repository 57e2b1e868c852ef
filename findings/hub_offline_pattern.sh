#!/usr/bin/env bash
# huggingface_hub 2.4.0, offline: the pattern "*.json" asks for the JSON files of every folder, and a cached snapshot that has all
# that the model needs is refused.
#
# Versions: huggingface_hub 2.4.0, Python 3.11.
# Behaviour: `*` of allow_patterns and ignore_patterns also matches `/`. And once the file listing of a commit lies in the cache (a
#   snapshot_download of it over the network writes one), snapshot_download without the network checks the patterns against that
#   listing, and raises IncompleteSnapshotError if a matching file is not there. Without the listing the same call returns the folder.
# Expected: "*.json" means the top folder, as in a shell or in pathlib's glob; and a call that names the files that a model needs
#   returns the folder that holds them.
# Seen:
#   "*.json" matches: ['config.json', 'onnx/config.json', 'tokenizer.json']
#   ["*.json", "*.safetensors"] without the listing: returned, 3 files
#   ["*.json", "*.safetensors"] with the listing: IncompleteSnapshotError for onnx/config.json
#   the same with ignore_patterns="*/*": returned, 3 files
# Why it matters: a machine on which a model is measured often has no network. A cache that was filled by names, or without `onnx/*`,
#   holds the whole model, but a snapshot_download with the usual two patterns fails there; online it downloads more than is meant.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

python3 -m venv "$tmp/venv"
python="$tmp/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check huggingface_hub==2.4.0

HOME="$tmp" HF_HUB_OFFLINE=1 "$python" - "$tmp/cache" <<'PY'
import json
import re
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.utils import filter_repo_objects

NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
LISTED = (*NEEDED, "onnx/config.json", "onnx/model.onnx")
PATTERNS = ["*.json", "*.safetensors"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

matched = sorted(filter_repo_objects(LISTED, allow_patterns="*.json"))
print(f'"*.json" matches: {matched}')

# The layout of the cache: refs/main names the commit, snapshots/COMMIT holds its files, trees/COMMIT.json lists what the repository has.
cache = Path(sys.argv[1])
repository = cache / "models--owner--tiny"
snapshot = repository / "snapshots" / COMMIT
for folder in (snapshot, repository / "refs", repository / "trees"):
    folder.mkdir(parents=True)
(repository / "refs" / "main").write_text(COMMIT)
for name in NEEDED:
    (snapshot / name).write_text("{}")


def asked(**further):
    try:
        folder = snapshot_download("owner/tiny", cache_dir=cache, allow_patterns=PATTERNS, **further)
    except IncompleteSnapshotError as error:
        return "IncompleteSnapshotError for " + re.search(r"missing \((.*?)\)", str(error)).group(1)
    return f"returned, {sum(1 for _ in Path(folder).iterdir())} files"


without = asked()
print(f'["*.json", "*.safetensors"] without the listing: {without}')
files = {name: {"size": 2, "blob_id": "0" * 40} for name in LISTED}
(repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
listed = asked()
print(f'["*.json", "*.safetensors"] with the listing: {listed}')
top = asked(ignore_patterns="*/*")
print(f'the same with ignore_patterns="*/*": {top}')

if not (
    matched == ["config.json", "onnx/config.json", "tokenizer.json"]
    and without == top == "returned, 3 files"
    and listed == "IncompleteSnapshotError for onnx/config.json"
):
    sys.exit("changed: patterns are no longer matched or checked as described")
PY
