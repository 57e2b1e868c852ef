"""True quality: KL divergence and perplexity against a slow, whole-logits version; nothing computed twice."""

import math
import re
from dataclasses import replace

import pytest
import torch

from methods import catalogue
from methods.apply import Installer, site_view
from methods.model.describe import describe
from methods.policy import Decision, Policy
from search.evaluate import Evaluator, NotFinite, Switch, paired, stderr
from tests.tiny import tiny_model

DECISION = Decision.of("rtn", format="w3a8-token")


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def setting(request):
    model = tiny_model(request.param)
    structure = describe(model)
    tokens = torch.randint(0, structure.n_vocab, (4, 150), generator=torch.Generator().manual_seed(2))
    calls = []

    def edit_of(site, decision):
        calls.append(site)
        return catalogue.apply(site_view(model, structure, structure.site(site)), {}, decision)

    return model, structure, tokens, edit_of, calls


def test_quality_equals_whole_logits(setting) -> None:
    model, structure, tokens, edit_of, _ = setting
    site = structure.sites[1].name
    policy = Policy({site: (DECISION,)})
    switch = Switch(model, structure, edit_of)
    evaluator = Evaluator(switch, tokens)
    found = evaluator.evaluate(policy)
    switch.dense()
    with torch.inference_mode():
        log_p = model(input_ids=tokens).logits.log_softmax(-1)
        with Installer(model, structure) as installer:
            installer.install(site, edit_of(site, DECISION))
            log_q = model(input_ids=tokens).logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    nll = -log_q[:, :-1].gather(-1, tokens[:, 1:, None]).mean((1, 2))
    assert torch.allclose(torch.tensor(found.kl_each), kl, rtol=2e-3, atol=1e-7)
    assert torch.allclose(torch.tensor(found.nll_each), nll, rtol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert found.n_tokens == tokens.numel()
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean(1)
    assert torch.allclose(torch.tensor(found.same_each), same) and 0.2 < found.top1 < 1


def test_the_dense_policy_costs_nothing(setting) -> None:
    model, structure, tokens, edit_of, _ = setting
    assert abs(Evaluator(Switch(model, structure, edit_of), tokens).evaluate(Policy()).kl) < 1e-6


def test_more_sequences_only_add_to_those_done(setting) -> None:
    model, structure, tokens, edit_of, _ = setting
    policy = Policy({structure.sites[0].name: (DECISION,)})
    evaluator = Evaluator(Switch(model, structure, edit_of), tokens)
    first = evaluator.evaluate(policy, 2)
    ran = []
    evaluator.evaluate(policy, 4, progress=lambda done, total: ran.append(done))
    assert ran == [3, 4]
    assert evaluator.evaluate(policy, 2) == first
    restored = Evaluator(Switch(model, structure, edit_of), tokens)
    restored.known(policy, first.kl_each)
    ran.clear()
    assert restored.evaluate(policy, 2, progress=lambda done, total: ran.append(done)).kl == first.kl
    assert ran == []


def test_the_model_comes_back_dense(setting) -> None:
    model, structure, tokens, edit_of, _ = setting
    before = {name: p.clone() for name, p in model.named_parameters()}
    switch = Switch(model, structure, edit_of)
    Evaluator(switch, tokens).evaluate(Policy({site.name: (DECISION,) for site in structure.sites}), 1)
    assert not all(torch.equal(before[name], p) for name, p in model.named_parameters())
    switch.dense()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_paired_differences_are_sharper_than_the_values() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [0.9, 1.9, 2.9, 3.9]
    mean, error = paired(a, b)
    assert mean == pytest.approx(0.1)
    assert error < 1e-9 < stderr(a)
    assert math.isnan(stderr([1.0]))


def test_two_corpora_share_one_model(setting) -> None:
    """What one evaluator leaves installed must not leak into the dense reference of the other."""
    model, structure, tokens, edit_of, _ = setting
    switch = Switch(model, structure, edit_of)
    first, second = Evaluator(switch, tokens[:2]), Evaluator(switch, tokens[2:])
    policy = Policy({structure.sites[0].name: (DECISION,)})
    first.evaluate(policy)
    assert second.evaluate(policy).kl > 1e-5
    edits = {structure.sites[0].name: edit_of(structure.sites[0].name, DECISION)}
    assert second.evaluate_edits(edits).kl == pytest.approx(second.evaluate(policy).kl)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_computes_no_number_is_no_result_and_its_layer_is_named(setting, value) -> None:
    model, structure, tokens, edit_of, _ = setting
    site = structure.sites[2]
    edit = edit_of(site.name, DECISION)
    layer = site.layers[-1].name
    broken = edit.linears[layer].dense.clone()
    broken[1, 2] = value
    edits = {site.name: replace(edit, linears={**edit.linears, layer: replace(edit.linears[layer], dense=broken)})}
    evaluator = Evaluator(Switch(model, structure, edit_of), tokens)
    with pytest.raises(NotFinite, match=f"from {re.escape(layer)} on"):
        evaluator.evaluate_edits(edits)
    evaluator.dense()
    assert evaluator.evaluate(Policy(), 1).kl == pytest.approx(0, abs=1e-6)
