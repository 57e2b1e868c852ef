"""Loads an exported folder in vLLM's CPU build as its `serve.json` says and prints the loss of a text; run by vLLM's own Python.

Arguments: the folder, and token ids as a JSON list. Prints one line, `nll VALUE`, in nats per token.
"""

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def main(folder: Path, ids: list[int]) -> float:
    entry = json.loads((folder / "serve.json").read_text())["vllm-cpu"]
    os.environ |= {**SETTINGS, **entry.get("env", {})}
    from vllm import LLM, SamplingParams, TokensPrompt

    flags = entry["command"][3:]
    options = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    engine = LLM(str(folder), enforce_eager=True, max_model_len=192, max_num_seqs=1, **options)
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (out,) = engine.generate([TokensPrompt(prompt_token_ids=ids)], parameters, use_tqdm=False)
    told = [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
    return -sum(told) / len(told)


if __name__ == "__main__":
    sys.stdout.write(f"nll {main(Path(sys.argv[1]), json.loads(sys.argv[2]))}\n")
