"""The policy file: what is written is read back, and what does not fit is refused with the place and the reason."""

import dataclasses
import random
from pathlib import Path

import pytest

from methods import catalogue
from methods.model.structure import LayerSpec, Site, Structure
from methods.policy import DENSE, Decision, Policy
from methods.policy_file import SCHEMA, PolicyFile, expanded_digest, parse, read, render, write
from methods.policy_rules import compress, decisions_of, expand, spec_of, table_of

D_IN = 192


def _site(block: int, leaves: list[str], parent: str, kind: str, experts: bool = False) -> Site:
    path = f"model.layers.{block}.{parent}"
    layers = tuple(LayerSpec(f"{path}.{leaf}", kind, block, D_IN, 80) for leaf in leaves)
    norm = None if kind == "down" else f"model.layers.{block}.norm"
    return Site(f"{path}.{'*.' if experts else ''}{'+'.join(leaves)}", kind, block, layers, norm=norm)


def structure(n_blocks: int = 12, experts: bool = False) -> Structure:
    sites = []
    for block in range(n_blocks):
        sites.append(_site(block, ["q_proj", "k_proj", "v_proj"], "self_attn", "qkv"))
        sites.append(_site(block, ["o_proj"], "self_attn", "o"))
        if experts:
            sites.append(_site(block, [f"experts.{e}.gate_up_proj" for e in range(11)], "mlp", "expert_gate_up", experts=True))
        else:
            sites.append(_site(block, ["gate_proj", "up_proj"], "mlp", "gate_up"))
        sites.append(_site(block, ["down_proj"], "mlp", "down"))
    blocks = tuple(f"model.layers.{b}" for b in range(n_blocks))
    return Structure("LlamaForCausalLM", blocks, tuple(sites), "lm_head", "embed", True, D_IN, 99, 6, 3, 32, "bf16", 10**6)


DECISIONS = (
    Decision.of("rtn", format="w4a16-g64"),
    Decision.of("rtn", format="w8a8-token", fitter="mse"),
    Decision.of("gptq", format="w4a8-g32-asym", damping=0.00001),
    Decision.of("gptq", format="w3a8-g64", damping=0.02, act_order=True),
    Decision.of("hqq", format="w2a8-g16-asym"),
    Decision.of("rtn", format="fp16"),
    Decision.of("gptq", format="nvfp4a4"),
    Decision.of("bcq", format="bcq3a16-g64", rounds=3),
    Decision.of("rtn", format="w6a4-token-g64"),
    Decision.of("rtn", format="fp8-token"),
    Decision.of("spqr", outliers=0.005),
    DENSE,
)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_reads_back_what_it_writes(tmp_path: Path, seed: int, experts: bool) -> None:
    draw = random.Random(seed)
    model = structure(experts=experts)
    common = draw.sample(DECISIONS, 2)
    policy = Policy({s.name: (draw.choice(DECISIONS if draw.random() < 0.2 else common),) for s in model.sites})
    file = PolicyFile(
        policy,
        id="trial: 7",
        model={"id": "m", "revision": "123e4"},
        target={"device": "no", "latency_budget_ms": 20, "when": "12:30", "spare": None},
        measured=({"metric": "latency_ms", "value": 17.9, "source": "measured", "ci95": [17.0, 1e-7]},),
        weights_algo={"seed": 0, "calib": {"tokens": 65536, "sha256": "0012"}},
        provenance={"created": "2026-01-02", "argv": ["run", "--x=1e-5", "{a: b}", "# no comment", "über\n"], "on": True},
    )
    write(tmp_path / "policy.yaml", file, model)
    back = read(tmp_path / "policy.yaml", model)
    assert back == file
    assert back.policy.key() == policy.key()
    assert render(back, model) == (tmp_path / "policy.yaml").read_text(encoding="utf-8")


def test_rules_are_few_and_the_last_one_wins() -> None:
    model = structure(30)
    usual, other = DECISIONS[0], DECISIONS[1]
    policy = {s.name: (other if s.block in (0, 29) and s.kind == "down" else usual,) for s in model.sites}
    rules = compress(table_of(Policy(policy), model), model)
    assert [rule.decisions for rule in rules] == [(usual,), (other,)]
    assert rules[1].match == "model.layers.{0,29}.mlp.down_proj"
    assert expand(rules, (DENSE,), model)["model.layers.29.mlp.down_proj"] == (other,)
    assert expand(rules[::-1], (DENSE,), model)["model.layers.29.mlp.down_proj"] == (usual,)


def test_experts_that_are_sites_of_their_own_keep_their_numbers() -> None:
    blocks = tuple(f"model.layers.{b}" for b in range(3))
    sites = tuple(_site(b, [f"experts.{e}.down_proj"], "mlp", "down") for b in range(3) for e in range(12))
    model = dataclasses.replace(structure(3), blocks=blocks, sites=sites)
    policy = Policy({site.name: (DECISIONS[0],) for site in sites if ".1.down_proj" in site.name})
    assert [rule.match for rule in compress(table_of(policy, model), model)] == ["model.layers.*.mlp.experts.1.down_proj"]


def test_a_file_written_by_hand() -> None:
    model = structure()
    text = """
schema: llm-compression-policy/1
weights_algo: {name: gptq, seed: 0}
default: {method: none}
rules:
  - {match: 'model\\.layers\\.\\d+\\.(self_attn|mlp)\\..*_proj', method: int, bits: 4, group: 64}
  - {match: 'model\\.layers\\.(1[01]|2)\\.mlp\\..*', method: int, bits: 8, act: 8, algo: {name: rtn, fitter: mse}, note: yes}
  - {match: '.*\\.0\\.mlp\\.down_proj', method: none}
"""
    policy = parse(text, model).policy
    assert policy.at("model.layers.0.self_attn.q_proj+k_proj+v_proj") == (Decision.of("gptq", format="w4a16-g64"),)
    assert policy.at("model.layers.2.mlp.gate_proj+up_proj") == (Decision.of("rtn", format="w8a8-token", fitter="mse"),)
    assert policy.at("model.layers.0.mlp.down_proj") == (DENSE,)
    assert len(policy.sites) == 4 * 12 - 1


def test_digest_depends_on_the_meaning_only() -> None:
    model = structure(3)
    one = "schema: llm-compression-policy/1\nrules:\n- {match: '.*down_proj', method: int, bits: 4, algo: rtn}\n"
    two = "schema: llm-compression-policy/1\ndefault: {method: int, bits: 4}\nrules:\n- {match: '.*(q|k|v|o|e|up)_proj', method: none}\n"
    assert parse(one, model).policy == parse(two, model).policy
    policy = parse(one, model).policy
    # Written out once: the digest must not change between processes and versions.
    assert expanded_digest(policy, model) == "sha256:1ea339b70e7456c0c3158589f5b8783b7d3cca1258c61d6b59b751623ce90913"
    other = Policy({**policy.sites, "model.layers.0.mlp.down_proj": (Decision.of("rtn", format="w8a16"),)})
    assert expanded_digest(other, model) != expanded_digest(policy, model)


def test_every_catalogue_decision_has_a_spec() -> None:
    for name in catalogue.METHODS:
        for fmt in ("w4a8-g64-asym", "w8a8-token", "w4a8-token-g32", "w8a16", "bf16"):
            decision = DENSE if name == "none" else Decision.of(name, format=fmt)
            assert decisions_of(spec_of((decision,))) == (decision,)


def test_several_decisions_at_a_site_keep_their_order() -> None:
    decisions = (Decision.of("smoothquant", alpha=0.5), Decision.of("gptq", format="w4a8-g64"))
    assert decisions_of(spec_of(decisions)) == decisions
    with pytest.raises(ValueError, match="only the last decision"):
        spec_of(decisions[::-1])


HEAD = f"schema: {SCHEMA}\n"
BAD = {
    "schema: llm-compression-policy/2\n": "this version reads llm-compression-policy/1 only",
    "schema: other/1\n": "a policy file begins with",
    "rules: []\n": "a policy file begins with",
    "- 1\n": "not a policy file",
    HEAD + "rulez: []\n": "did you mean 'rules'",
    HEAD + "shape: {}\n": "unknown field 'shape'",
    HEAD + "rules: {}\n": "is not a list",
    HEAD + "rules: [x]\n": r"rules\[0\]: 'x' is not a mapping",
    HEAD + "rules: [{match: '.*', method: int, bit: 4}]\n": "did you mean 'bits'",
    HEAD + "rules: [{method: int, bits: 4}]\n": r"rules\[0\].match: None is not text",
    HEAD + "rules: [{match: '.*', method: fp8}]\n": "method='fp8'",
    HEAD + "rules: [{match: '.*', method: int}]\n": "needs bits",
    HEAD + "rules: [{match: '.*', method: int, bits: 9}]\n": "bits=9",
    HEAD + "rules: [{match: '.*', method: int, bits: true}]\n": "bits=True; use a whole number",
    HEAD + "rules: [{match: '.*', method: int, bits: 4.0}]\n": "use a whole number",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, group: 8}]\n": "group=8",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, group: 128}]\n": "does not divide d_in=192",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, sym: 1}]\n": "sym=1; use true or false",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, act: 5}]\n": "act_bits=5",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, act_group: token}]\n": "act_group means nothing",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, act: 8, act_group: row}]\n": "use token or group",
    HEAD + "rules: [{match: '.*', method: none, bits: 4}]\n": "bits=4 means nothing",
    HEAD + "rules: [{match: '.*', method: float, dtype: fp8}]\n": "dtype='fp8'",
    HEAD + "rules: [{match: '.*', method: grid, format: fp8}]\n": "unknown format 'fp8'",
    HEAD + "rules: [{match: '.*', method: grid, format: w4a16}]\n": "write it as method: int",
    HEAD + "rules: [{match: '.*', method: grid, format: nf4, bits: 4}]\n": "bits=4 means nothing with method: grid",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, format: nf4}]\n": "format='nf4' means nothing with method: int",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, algo: gptw}]\n": "did you mean gptq",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, algo: {name: gptq, damp: 1}}]\n": "unknown knob 'damp'",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, algo: {name: gptq, damping: [1]}}]\n": r"damping=\[1\]",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, algo: {name: rtn, format: w8a16}}]\n": "is written as bits",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, algo: none}]\n": "name the method that rounds",
    HEAD + "rules: [{match: '.*', method: int, bits: 4, algo: []}]\n": "empty list",
    HEAD + "rules: [{match: '.*down_proj', method: int, bits: 4, algo: awq}]\n": "follows no norm",
    HEAD + "rules: [{match: '(', method: none}]\n": "a group is not closed",
    HEAD + "rules: [{match: 'layers.0', method: none}]\n": "matches no linear",
    HEAD + "rules: [{match: '.*layers.0.mlp', method: none}]\n": "matches no linear",
    HEAD + "rules: [{match: '.*(q|o)_proj', method: int, bits: 4}]\n": "runtimes fuse",
    HEAD + "rules: []\nrules: []\n": "not YAML in line 3: 'rules' is given twice",
    HEAD + "rules: [{match: '.*', method: none, method: none}]\n": "'method' is given twice",
    HEAD + "target: {1: 2}\n": "key 1 is not text",
    HEAD + "target: [1]\n": "not a mapping",
    HEAD + "target: {x: .nan}\n": "document.target.x: nan",
    HEAD + "target: {x: 1e999}\n": "inf is not a number",
    HEAD + "target: {x: !!binary aGk=}\n": "the tag .*binary is not used here",
    HEAD + "target: !!python/object:os.system {}\n": "the tag .*os.system is not used here",
    HEAD + "target: &a {x: *a}\n": "aliases are not used",
    HEAD + "target: {\n": "not YAML in line",
    HEAD + "measured: [{metric: ppl, value: 3}]\n": "needs metric, value and source",
    HEAD + "measured: [{metric: ppl, value: '3', source: measured}]\n": "is not a number",
    HEAD + "measured: [{metric: ppl, value: 3, source: guessed}]\n": "source='guessed'",
    HEAD + "measured: {}\n": "measured: {} is not a list",
    HEAD + "model: {arch: GPT2LMHeadModel}\n": "arch='GPT2LMHeadModel'",
    HEAD + "model: {n_modules: 7}\n": "n_modules=7",
    HEAD + "id: 5\n": "id: 5 is not text",
    HEAD + "expanded_digest: sha256:00\n": "remove the expanded_digest line",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_refuses(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=BAD[text]) as error:
        read(path, structure(2))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_does_not_write_what_it_could_not_read(tmp_path: Path) -> None:
    model = structure(2)
    path = tmp_path / "policy.yaml"
    with pytest.raises(ValueError, match="does not divide"):
        write(path, PolicyFile(Policy({model.sites[0].name: (Decision.of("rtn", format="w4a16-g128"),)})), model)
    with pytest.raises(KeyError, match="no site"):
        write(path, PolicyFile(Policy({"model.layers.7.mlp.down_proj": (DECISIONS[0],)})), model)
    with pytest.raises(ValueError, match="for a model as a whole"):
        write(path, PolicyFile(Policy(model=(DECISIONS[0],))), model)
    with pytest.raises(ValueError, match="nan"):
        PolicyFile(Policy(), provenance={"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_text_that_is_not_utf8_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        read(path, structure(1))
