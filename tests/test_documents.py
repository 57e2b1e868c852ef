"""The pages say what is true: their commands run, their examples are judged as the code they are like, their links lead somewhere.

Commands run in the order of the page, in a folder of the page's own, with the replacements of `tests.documents.runnable` and no others.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import profilers.datasheets
import profilers.kernels.catalogue
import search.export.registry
import tests.methods.test_laws as laws
import tests.profilers.test_kernels as kernel_tests
import tests.search.test_strategies as strategy_laws
from methods.apply import Installer
from methods.catalogue import METHODS, apply
from methods.formats import elements, format
from methods.formats.elements import levels
from methods.formats.format import parse_format
from methods.formats.numerics import decode, payload_bits
from methods.method import Stage
from methods.policy import Decision
from methods.policy_file import PolicyFile
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.outliers import of_the_rest
from methods.quant.parts import FITTERS
from search import reference
from search.cli import _parser, main
from search.config import from_arguments
from search.export.registry import exporter
from tests.documents import (
    HOW_TO,
    NOT_RUN,
    PAGES,
    ROOT,
    blocks,
    commands,
    elsewhere,
    inline_commands,
    links,
    runnable,
    small_model,
)
from tests.edits import edits_of, loaded_tiny
from tests.tiny import tiny_tokens


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all pages: kernels are compiled and cells measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The command line sets up warnings and logging for a process of its own."""
    handlers, level = logging.root.handlers[:], logging.root.level
    with warnings.catch_warnings():
        yield
    logging.root.handlers[:], logging.root.level = handlers, level


def everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Another value for a name in every module that defines or imports it."""
    for path in [path for package in ("profilers", "predictors", "search") for path in (ROOT / package).rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        if re.search(rf"^(from .* import .*\b)?{name}\b", source, re.MULTILINE):
            user = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            monkeypatch.setattr(user, name, value)


def example(page: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's Python as a module, with what its `NEW_…` names registered as long as the test runs."""
    name = "page_" + re.sub(r"\W", "_", page)
    module = ModuleType(name)
    module.__file__ = str(ROOT / page)
    monkeypatch.setitem(sys.modules, name, module)
    for block in blocks(text(page)):
        if block.language == "python":
            before = set(vars(module))
            exec(compile("\n" * (block.line - 1) + block.text, module.__file__, "exec"), vars(module))
            register({key: value for key, value in vars(module).items() if key not in before}, name, monkeypatch)
    return module


def register(new: Mapping[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enters what a block defines where the page says that it belongs; name: of the page's module."""
    tables: list[tuple[Any, Mapping[Any, Any]]] = [
        (METHODS, {recipe.name: recipe for recipe in new.get("NEW_METHODS", ())}),
        (FITTERS, {fitter: of_the_rest(fit) for fitter, fit in new.get("NEW_FITTERS", {}).items()}),
        (elements.TABLES, new.get("NEW_ELEMENTS", {})),
        (elements.BITS, {element: (4,) for element in new.get("NEW_ELEMENTS", {})}),
        (format.NAMED, new.get("NEW_FORMATS", {})),
        (format._NAME_OF, {fmt: named for named, fmt in new.get("NEW_FORMATS", {}).items()}),
    ]
    for table, entries in tables:
        for key, value in entries.items():
            monkeypatch.setitem(table, key, value)
    everywhere(monkeypatch, "KERNELS", (*profilers.kernels.catalogue.KERNELS, *new.get("NEW_KERNELS", ())))
    sheets = {sheet.name: sheet for sheet in new.get("NEW_DATASHEETS", ())}
    everywhere(monkeypatch, "DATASHEETS", {**profilers.datasheets.DATASHEETS, **sheets})
    if "supports" in new:
        monkeypatch.setattr(search.export.registry, "EXPORTERS", {**search.export.registry.EXPORTERS, "npz": name})


def check(words: Sequence[str]) -> None:
    """Raises AssertionError where the command line knows no such command, flag or value, or the program is none that pages use."""
    if words[0] == "make":
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(words[1:]) <= targets, f"{' '.join(words)}: the Makefile has {', '.join(sorted(targets))}"
    elif words[0] == "python":
        script = words[2] if words[1] == "-m" else words[1]
        known = importlib.util.find_spec(script) is not None if words[1] == "-m" else (ROOT / script).is_file()
        assert known, f"{' '.join(words)}: no {script}"
    elif words[0] != "search":
        assert words[0] in NOT_RUN, f"{' '.join(words)}: neither run nor listed in tests.documents.NOT_RUN"
    else:
        try:
            parsed = _parser().parse_args(words[1:])
        except SystemExit:
            raise AssertionError(f"the command line does not know: {' '.join(words)}") from None
        if words[1] == "run":
            from_arguments(parsed)


BUSY = ("run", "validate", "doctor", "profile")
"""Commands that end with 1 where the machine is too busy to claim what they are asked for."""


@pytest.mark.parametrize("page", [pytest.param("README.md", marks=pytest.mark.slow), *PAGES[1:]])
def test_commands_run(
    page: str,
    model: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ISOLATENCY_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    example(page, monkeypatch)
    for recipe in METHODS.values():
        if recipe.learner:
            short = replace(recipe.knobs["steps"], default=2)
            monkeypatch.setitem(recipe.knobs, "steps", short)  # type: ignore[arg-type]
    for command in commands(text(page)):
        check(command.words)
        if command.words[0] == "search":
            arguments = runnable(command.words, model, tmp_path)
            code = main(arguments)
            output = capsys.readouterr()
            said = f"{page}:{command.line}: search {' '.join(arguments)}\n{output.out}{output.err}"
            assert code == 0 or (code == 1 and command.words[1] in BUSY), said
            if command.words[1] == "profile":
                elsewhere(Path(arguments[arguments.index("--out") + 1]))


def test_the_runs_of_the_first_page_can_be_planned(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its searches as dry runs, in the time of one: models, texts, formats, methods and targets are looked at, nothing is measured."""
    monkeypatch.setenv("ISOLATENCY_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    found = commands(text("README.md"))
    for command in found:
        check(command.words)
    runs = [command.words for command in found if command.words[:2] == ("search", "run")]
    for words in runs:
        arguments = runnable([*words, "--dry-run"], model, tmp_path)
        assert main(arguments) == 0, f"search {' '.join(arguments)}\n{capsys.readouterr().err}"
    assert len(runs) > 5 and not (tmp_path / "results").exists()


def _flags(name: str) -> set[str]:
    (subparsers,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert name in subparsers.choices, f"search {name}: there is no such command"
    return set(subparsers.choices[name]._option_string_actions)


def check_inline(command: str) -> None:
    """Raises AssertionError where a command within a line of text names a command or a flag that there is not."""
    words = command.split()
    if len(words) > 1 and not words[1].startswith("-"):
        flags = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert flags <= _flags(words[1]), f"`{command}`: search {words[1]} has no {', '.join(flags - _flags(words[1]))}"


@pytest.mark.parametrize("page", [*PAGES, "search/reference.md"])
def test_commands_in_the_text_exist(page: str) -> None:
    for command in inline_commands(text(page)):
        check_inline(command)


@pytest.mark.parametrize(
    "line",
    ["search run --latencyy 0.6x", "search exprot results/s --format gguf", "search run --evaluations few", "serach run"],
)
def test_a_wrong_command_is_found(line: str) -> None:
    (command,) = commands(f"Text\n\n```sh\n{line}\n```\n")
    with pytest.raises(AssertionError):
        check(command.words)


def test_wrong_commands_in_the_text_and_in_indented_blocks_are_found() -> None:
    page = "Run `search run --latencyy 0.6x`:\n\n    search run --latency 3ms\n    serach show x\n\n    a file tree\n"
    with pytest.raises(AssertionError, match="latencyy"):
        check_inline(inline_commands(page)[0])
    assert [command.words[0] for command in commands(page)] == ["search", "serach"]
    with pytest.raises(ValueError, match="a fence of 'hs'"):
        blocks("```hs\nsearch run\n```\n")


@pytest.mark.parametrize("page", [*PAGES, "search/reference.md"])
def test_links_lead_to_files(page: str) -> None:
    targets = links(text(page))
    assert targets
    for target in targets:
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_page_can_be_reached_from_the_first() -> None:
    reached = {(ROOT / target).resolve() for target in links(text("README.md"))}
    assert {ROOT / page for page in (*PAGES[1:], "search/reference.md")} <= reached


def test_the_reference_is_what_the_code_says() -> None:
    """Written by `python -m search.reference > search/reference.md`."""
    assert text("search/reference.md") == reference.text()


METHOD_EXAMPLES = ("awq-ldlq", "sigma-clip")


@pytest.mark.parametrize("name", METHOD_EXAMPLES)
def test_the_method_examples_keep_the_laws(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [recipe.name for recipe in example("methods/README.md", monkeypatch).NEW_METHODS] == list(METHOD_EXAMPLES)
    legal = [fmt for fmt in laws.FORMATS if METHODS[name].refuses(laws.SITE, {"format": fmt}) is None]
    assert len(legal) > 8
    legal = legal[::8]
    monkeypatch.setattr(laws, "CASES", [(name, fmt) for fmt in legal])
    for fmt in legal:
        laws.test_edit_keeps_shapes_is_finite_and_decodes_bit_for_bit(name, fmt)
        laws.test_approximates_the_layer(name, fmt)
        laws.test_is_deterministic_and_leaves_its_inputs_alone(name, fmt)
        laws.test_plan_costs_what_the_payload_weighs(name, fmt)
    laws.test_the_bank_gives_back_what_it_was_given(name, tmp_path)
    laws.test_reads_exactly_the_statistics_it_declares(name)
    laws.test_weights_that_are_not_finite_are_refused(name, float("nan"))
    assert METHODS[name].limits
    for limit in METHODS[name].limits:
        laws.test_limit_settings_are_the_simpler_method(name, limit)


def test_the_method_examples_differ_from_what_they_generalise(monkeypatch: pytest.MonkeyPatch) -> None:
    example("methods/README.md", monkeypatch)
    for knobs, name, simpler in (({}, "awq-ldlq", "awq-gptq"), ({"sigmas": 2.0}, "sigma-clip", "rtn")):
        one = apply(laws.view(), laws.statistics(), Decision.of(name, format="w3a16-g48", **knobs))
        other = apply(laws.view(), laws.statistics(), Decision.of(simpler, format="w3a16-g48"))
        assert any(not torch.equal(one.linears[layer].dense, other.linears[layer].dense) for layer in one.linears)


def test_the_format_example_has_numerics_a_size_and_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    named = example("methods/formats/README.md", monkeypatch).NEW_FORMATS
    assert named == {"bnb-fp4": parse_format("bnb-fp4")} and parse_format("fp4a8-token-g48").act_bits == 8
    weight = torch.randn(13, 192, generator=torch.Generator().manual_seed(0)) * 0.05
    for name in ("bnb-fp4", "fp4a16-g48", "fp4a16-whole"):
        fmt = parse_format(name)
        assert fmt.name == name
        grid = minmax(weight, fmt)
        payload = nearest(weight, fmt, grid)
        scale = grid.scale.float().repeat_interleave(192 // grid.scale.shape[1], 1)
        candidates = torch.tensor(levels("fp", 4)) * scale[..., None]
        best = (candidates - weight[..., None]).abs().amin(-1)
        assert torch.equal((decode(fmt, payload) - weight).abs(), best)
        assert payload_bits(fmt, payload) == pytest.approx(fmt.bits_per_weight(192, 13) * weight.numel())
    takers = [name for name, recipe in METHODS.items() if recipe.stage is Stage.QUANTIZE and recipe.formats(fmt) is None]
    assert {"rtn", "gptq", "awq"} <= set(takers)
    for name in ("rtn", "gptq"):
        laws.test_edit_keeps_shapes_is_finite_and_decodes_bit_for_bit(name, "fp4a16-g48")
        laws.test_approximates_the_layer(name, "fp4a16-g48")


@pytest.mark.parametrize("fmt", ["e4m3a16", "e5m2a16-g48", "e2m3a16-g64", "e2m1a16-g96"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_example_agrees_with_the_reference(fmt: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = example("profilers/kernels/README.md", monkeypatch).NEW_KERNELS
    monkeypatch.setattr(kernel_tests, "supported", lambda *key: [kernel] if kernel.supports(*key) is None else [])
    kernel_tests.test_every_kernel_agrees_with_the_reference(fmt, dtype)
    assert kernel.supports(parse_format("w4a16-g64"), 40, 192, 1, kernel_tests.TARGET)
    assert len(kernel.source_hash) == 16


def test_the_strategy_example_keeps_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    (strategy,) = example("search/strategies/README.md", monkeypatch).NEW_STRATEGIES

    def make(problem, budget_ms, seeds, seed):  # type: ignore[no-untyped-def]
        return strategy(problem, budget_ms, seeds or [problem.policy((1, 1, 1))], seed=seed)

    for share in (0.1, 0.5, 0.95):
        strategy_laws.within_the_budget_and_never_twice(make, share)
    strategy_laws.deterministic_in_its_seed(make)
    strategy_laws.ends_without_what_was_told(make)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_export_example_loads_as_what_was_evaluated(arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np

    example("search/export/README.md", monkeypatch)
    npz, loaded = exporter("npz"), loaded_tiny(tmp_path, arch)
    names = [site.name for site in loaded.structure.sites[:-1]]
    policy, edits = edits_of(
        loaded.model, loaded.structure, {name: ("w4a16-g32", "w8a16")[i % 2] for i, name in enumerate(names)}
    )
    npz.export(tmp_path / "out", loaded, PolicyFile(policy), edits)
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        assert npz.verify(tmp_path / "out", loaded.model, tiny_tokens(2, 40)).ok
        with np.load(tmp_path / "out" / "weights.npz") as arrays:
            state = dict(arrays)
        state[next(iter(edits[names[0]].linears)) + ".weight"][3, 5] += 0.01
        np.savez(tmp_path / "out" / "weights.npz", **state)
        assert not npz.verify(tmp_path / "out", loaded.model, tiny_tokens(2, 40)).ok
    wrong, bad = edits_of(loaded.model, loaded.structure, {names[0]: "w8a8-token"})
    with pytest.raises(ValueError, match="no place for the rounding"):
        npz.export(tmp_path / "refused", loaded, PolicyFile(wrong), bad)


def test_the_target_example_is_known_and_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    from profilers.resolution import look_up
    from profilers.target import TargetError

    (sheet,) = example("profilers/README.md", monkeypatch).NEW_DATASHEETS
    found = look_up(sheet.name, ())
    assert found.state == "datasheet" and found.target is not None and found.target.label == "modelled"
    from profilers.resolution import resolve

    with pytest.raises(TargetError, match="--allow-modelled"):
        resolve(sheet.name, ())


def test_how_to_pages_have_an_example_and_name_their_tests() -> None:
    for page in HOW_TO:
        assert any(block.language == "python" for block in blocks(text(page))), page
        assert any("tests/" in target for target in links(text(page))), page
