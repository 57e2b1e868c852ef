#!/usr/bin/env bash
# lm-eval 0.4.13 takes a base file that is included by two ways for a cycle, and drops the task without a word.
#
# Versions: lm-eval 0.4.13, datasets 5.2.0, jinja2 3.1.6, pyyaml 6.0.3, requests 2.34.2, sacrebleu 2.6.0, Python 3.11.
# Behaviour: `include: [prompt, data]` fails where both files include the same third one, since the files that were seen are remembered
#   over the whole file instead of along one chain. While the tasks of a folder are listed, that error is caught and logged at level
#   DEBUG: the task is missing from the TaskManager, and the log at level INFO shows nothing.
# Expected: no cycle is there, so that the shared file is read twice and merged; and a task file that cannot be read is told.
# Seen:
#   tasks found: ['one_way']; messages at INFO and above: 0
#   two_ways.yaml loaded by its path: ValueError: Include cycle at .../base
# Why it matters: task variants that measure a compressed model (prompt, few-shot examples, data split) are put together from shared
#   files. A task that vanishes changes what a glob such as `two_*` selects, and with it the average that two models are compared by.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

python3 -m venv "$tmp/venv"
python="$tmp/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 jinja2==3.1.6 pyyaml==6.0.3 requests==2.34.2 sacrebleu==2.6.0
"$python" -m pip install --quiet --disable-pip-version-check --no-deps lm-eval==0.4.13  # the packages above are all that this needs

mkdir "$tmp/tasks"
cat >"$tmp/tasks/base" <<'YAML'
dataset_path: json
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
YAML
printf 'include: base\ndoc_to_text: "Question: {{question}}"\n' >"$tmp/tasks/prompt"
printf 'include: base\ntest_split: test\n' >"$tmp/tasks/data"
printf 'include: prompt\ntask: one_way\n' >"$tmp/tasks/one_way.yaml"
printf 'include: [prompt, data]\ntask: two_ways\n' >"$tmp/tasks/two_ways.yaml"

HOME="$tmp" HF_HUB_OFFLINE=1 "$python" - "$tmp/tasks" <<'PY'
import logging
import sys
from pathlib import Path

from lm_eval.tasks import TaskManager

messages = []


class Kept(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())


logging.basicConfig(level=logging.INFO, handlers=[Kept()])
logging.getLogger("lm_eval").setLevel(logging.INFO)
folder = Path(sys.argv[1])
manager = TaskManager(include_path=folder, include_defaults=False)
print(f"tasks found: {manager.all_tasks}; messages at INFO and above: {len(messages)}")

error = ""
try:
    manager.load(str(folder / "two_ways.yaml"))
except ValueError as raised:
    error = f"{type(raised).__name__}: {raised}".replace(str(folder.resolve()), "...")
print(f"two_ways.yaml loaded by its path: {error or 'no error'}")

if not (manager.all_tasks == ["one_way"] and not messages and error == "ValueError: Include cycle at .../base"):
    sys.exit("changed: a file included by two ways is no longer handled as described")
PY
