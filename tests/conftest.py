"""One torch thread (parallel workers share the cores), no network, and no test waits for a quiet machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

import profilers.pace

torch.set_num_threads(1)

# Before anything else imports it: what is timed in a test counts as timed at full pace, however busy the machine is.
ALWAYS_FULL = profilers.pace.Pace(lambda: 1.0, first_s=0.0)
profilers.pace.pace_of = lambda target: ALWAYS_FULL
