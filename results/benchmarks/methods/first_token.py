"""What counting the first token is worth: whole-model KL of methods with `first=1` and as they are by default, on several texts.

One calibration sweep over the dense model makes all of them; a table in Markdown goes to stdout. The ratio is that of the mean KL, with the
standard error of the paired difference in the same unit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from methods import catalogue
from methods.apply import site_view
from methods.bank import Bank
from methods.calibrate import sweep
from methods.formats.format import parse_format
from methods.method import Stats
from methods.model.load import LoadedModel, load
from methods.model.structure import Site
from methods.policy import Decision
from search.config import default_cache
from search.data import read_documents, tokenize
from search.evaluate import Evaluator, Switch, paired
from spaces.space import with_format


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate", required=True, metavar="TEXT")
    parser.add_argument("--evaluate", required=True, nargs="+", metavar="TEXT", help="held-out texts")
    parser.add_argument("--model", default="default", help="as `search run --model`")
    parser.add_argument("--methods", nargs="+", default=["gptq"], help="NAME or NAME:KNOB=VALUE:…")
    parser.add_argument("--format", default="w4a16-g64")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, of each held-out text")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of converted models")
    options = parser.parse_args()
    loaded = load(None if options.model == "default" else options.model, options.cache)
    plain = {method: with_format(method, parse_format(options.format)) for method in options.methods}
    pairs = {method: (_counting(decision, 1), decision) for method, decision in plain.items()}
    tokens = tokenize(read_documents(options.calibrate), loaded.tokenizer, options.tokens // options.sequence, options.sequence)
    sys.stdout.write("| method | text | first=1 | default | ratio | ± |\n|---|---|--:|--:|--:|--:|\n")
    with tempfile.TemporaryDirectory() as folder:
        bank = Bank(Path(folder))
        made = _made(loaded, tokens, [decision for pair in pairs.values() for decision in pair], bank)
        switch = Switch(loaded.model, loaded.structure, bank.get)
        for text in options.evaluate:
            evaluator = Evaluator(switch, tokenize(read_documents(text), loaded.tokenizer, options.windows, 512))
            for method, pair in pairs.items():
                alike, counted = (
                    evaluator.evaluate_edits({site: bank.get(site, own) for site, own in made[decision].items()})
                    for decision in pair
                )
                error = paired(counted.kl_each, alike.kl_each)[1] / alike.kl
                row = f"{alike.kl:.4f} | {counted.kl:.4f} | {counted.kl / alike.kl:.3f} | {error:.3f}"
                sys.stdout.write(f"| {method} | {Path(text).parent.name}/{Path(text).stem} | {row} |\n")
                sys.stdout.flush()


def _counting(decision: Decision, first: int) -> Decision:
    return Decision.of(decision.method, **{**dict(decision.knobs), "first": first})


def _made(
    loaded: LoadedModel, tokens: torch.Tensor, decisions: Sequence[Decision], bank: Bank
) -> dict[Decision, dict[str, Decision]]:
    """Everything into the bank; by decision, what stands at each site: plain feedback where the method refuses."""
    structure = loaded.structure
    made = {decision: {site.name: _at(site, decision) for site in structure.sites} for decision in decisions}

    def visit(block: int, stats: Mapping[str, Stats]) -> None:
        for site in structure.in_block(block):
            view = site_view(loaded.model, structure, site)
            for own in dict.fromkeys(made[decision][site.name] for decision in decisions):
                bank.put(site.name, own, catalogue.apply(view, stats, own))
        sys.stderr.write(f"block {block + 1} of {len(structure.blocks)}\n")

    needs = {site.name: catalogue.needs(own[site.name] for own in made.values()) for site in structure.sites}
    sweep(loaded.model, structure, [tokens[i : i + 1] for i in range(len(tokens))], needs, visit, dense=True)
    return made


def _at(site: Site, decision: Decision) -> Decision:
    if catalogue.refuses(site, decision) is None:
        return decision
    rest = {name: value for name, value in decision.knobs if name in ("format", "first")}
    return Decision.of("gptq", **rest)


if __name__ == "__main__":
    main()
