"""Output-space Fisher scores against the true KL divergence of the same single change."""

import pytest
import torch

from methods import catalogue
from methods.apply import Installer, site_view
from methods.model.describe import describe
from methods.model.head import final_hidden, project
from methods.policy import Decision
from predictors.sensitivity import score
from tests.tiny import tiny_model

DECISIONS = [Decision.of("rtn", format=name) for name in ("w4a16", "w4a8-token", "w3a16-asym")]


def scored_and_true(arch: str, decisions: list[Decision]) -> torch.Tensor:
    """(n, 2): the score and the true KL divergence of every decision at every site."""
    model = tiny_model(arch)
    structure = describe(model)
    ids = torch.randint(0, structure.n_vocab, (6, 40), generator=torch.Generator().manual_seed(1))
    edits = {}
    for site in structure.sites:
        view = site_view(model, structure, site)
        stats = {layer.name: _stats(layer.d_in) for layer in site.layers}
        for decision in decisions:
            if catalogue.refuses(site, decision) is None:
                edits[site.name, decision.label] = catalogue.apply(view, stats, decision)
    scores = score(
        model,
        structure,
        ids,
        lambda site: ((label, edit) for (name, label), edit in edits.items() if name == site.name),
        lambda site: site_view(model, structure, site).norm,
        n_probes=32,
    )
    rows = []
    with torch.inference_mode(), Installer(model, structure) as installer:
        log_p = project(model, structure, final_hidden(model, ids)).log_softmax(-1)
        for (site_name, label), edit in edits.items():
            installer.install(site_name, edit)
            log_q = project(model, structure, final_hidden(model, ids)).log_softmax(-1)
            installer.install(site_name, None)
            rows.append([scores.kl[site_name][label], float((log_p.exp() * (log_p - log_q)).sum(-1).mean())])
    return torch.tensor(rows, dtype=torch.float64)


def _stats(d_in: int):
    from methods.method import Stats

    generator = torch.Generator().manual_seed(d_in)
    sample = torch.randn(64, d_in, generator=generator)
    return Stats(64, sample.T @ sample / 64, sample.abs().amax(0), sample.abs().mean(0), sample)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma2"])
def test_score_is_the_kl_divergence_of_a_small_change(arch: str) -> None:
    rows = scored_and_true(arch, DECISIONS)
    ratio = rows[:, 0] / rows[:, 1]
    assert 0.85 < float(ratio.median()) < 1.15
    assert float(torch.corrcoef(rows.log().T)[0, 1]) > 0.98


def test_experts_are_scored_over_mixed_sequences() -> None:
    rows = scored_and_true("qwen3-moe", DECISIONS)
    assert 0.6 < float((rows[:, 0] / rows[:, 1]).median()) < 1.6


def test_folded_scales_are_scored_in_the_original_coordinates() -> None:
    """A transform that folds into the norm leaves the function alone: 8 bits after it must score as little as 8 bits without."""
    rows = scored_and_true("llama", [Decision.of("smoothquant", format="w8a8-token")])
    assert float(rows[:, 0].max()) < 1e-3
    assert 0.7 < float((rows[:, 0] / rows[:, 1]).median()) < 1.4
