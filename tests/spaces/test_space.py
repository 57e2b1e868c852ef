"""Spaces hold what can run and say what was dropped; runtimes refuse with the reason that matters."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from methods import catalogue
from methods.formats.format import Format, parse_format
from methods.method import Plan
from methods.model.structure import Feed, LayerSpec, Site, Structure
from methods.policy import DENSE, Decision
from methods.recipes.recipe import norm_site
from profilers.kernels.catalogue import supported
from profilers.target import Target
from search.method_list import has_kernel
from spaces.runtimes import DEFAULT_FORMATS, RUNTIMES, default_formats, runtime
from spaces.space import ROUNDED, build


def _site(name: str, d_in: int, d_out: int = 80, kind: str = "o", transposed: bool = False, n: int = 1) -> Site:
    layers = tuple(LayerSpec(f"{name}.{i}", kind, 0, d_in, d_out, transposed=transposed) for i in range(n))
    return Site(name, kind, 0, layers, norm="norm" if kind == "qkv" else None)


def _structure(*sites: Site) -> Structure:
    return Structure("Tiny", ("b.0",), sites, "head", "embed", True, 96, 128, 6, 3, 16, "bf16", 10**6)


def anything(fmt: Format, site: Site) -> str | None:
    return None


QKV, DOWN = _site("qkv", 192, kind="qkv", n=3), _site("down", 160)


def test_choices_are_priced_with_their_scales() -> None:
    space = build(
        _structure(QKV, DOWN), ["bf16", "w4a8-g32-asym", "w8a8-token"], ["rtn", "gptq"], runtime("isolatency"), anything
    )
    labels = [choice.decision.label for choice in space.choices["qkv"]]
    assert labels == [
        "none",
        "rtn:format=w4a8-g32-asym",
        "gptq:format=w4a8-g32-asym",
        "rtn:format=w8a8-token",
        "gptq:format=w8a8-token",
    ]
    dense, four = space.choices["qkv"][:2]
    n_weights = 3 * 192 * 80
    assert (dense.decision, dense.bits_per_weight, dense.size_bytes) == (DENSE, 16.0, n_weights * 2)
    assert four.bits_per_weight == 4 + 32 / 32
    assert four.size_bytes == n_weights // 2 + (n_weights // 32) * 4
    assert space.choice("qkv", four.decision) == four
    assert not space.dropped and not space.notes
    assert space.size_log10 == pytest.approx(1.39794)


@pytest.mark.parametrize(
    ("dtype", "compute", "name", "offered"),
    [
        ("fp16", "bf16", "isolatency", True),
        ("fp32", "bf16", "isolatency", True),
        ("bf16", "bf16", "isolatency", False),  # and never fp16, which does not reach as far
        ("fp16", "fp32", "isolatency", False),
        ("fp16", "bf16", "vllm", False),
        ("fp16", "", "isolatency", False),
    ],
)
def test_sites_may_be_rounded_to_the_dtype_that_is_multiplied_in(dtype: str, compute: str, name: str, offered: bool) -> None:
    structure = replace(_structure(QKV, DOWN), dtype=dtype)
    space = build(structure, ["w8a16", "fp16"], ["gptq"], runtime(name), anything, compute)
    for site in (QKV, DOWN):
        labels = [choice.decision.label for choice in space.choices[site.name]]
        assert labels == ["none", *(["rtn:format=bf16"] if offered else []), "gptq:format=w8a16"]
    if offered:
        rounded = space.choice("down", ROUNDED)
        assert (rounded.format.name, rounded.bits_per_weight, rounded.size_bytes) == ("bf16", 16.0, 2 * 160 * 80)


def test_rounding_to_another_dtype_is_no_compression_and_needs_a_kernel() -> None:
    structure = replace(_structure(DOWN), dtype="fp16")

    def no(names: tuple[str, ...]) -> Callable[[Format, Site], str | None]:
        return lambda fmt, site: "no kernel" if fmt.name in names else None

    with pytest.raises(ValueError, match="nothing can be compressed"):
        build(structure, ["w8a16"], ["rtn"], runtime("isolatency"), no(("w8a16",)), "bf16")
    space = build(structure, ["w8a16"], ["rtn"], runtime("isolatency"), no(("bf16",)), "bf16")
    assert [choice.format.name for choice in space.choices["down"]] == ["fp16", "w8a16"]


def test_a_group_that_does_not_divide_is_replaced_and_noted() -> None:
    odd = _site("odd", 100)
    space = build(_structure(QKV, DOWN, odd), ["w4a8-g64-asym", "w4a8-g32-asym"], ["rtn"], runtime("isolatency"), anything)
    formats = {site: [choice.format.name for choice in choices[1:]] for site, choices in space.choices.items()}
    assert formats == {
        "qkv": ["w4a8-g64-asym", "w4a8-g32-asym"],
        "down": ["w4a8-g32-asym"],
        "odd": ["w4a8-token-asym"],
    }
    assert "w4a8-g64-asym -> w4a8-g32-asym where it does not divide 160 inputs: down" in space.notes
    assert "w4a8-g64-asym -> w4a8-token-asym where it does not divide 100 inputs: odd" in space.notes


def test_the_replacement_is_a_smaller_group() -> None:
    space = build(_structure(_site("x", 256)), ["w4a16-g48"], ["rtn"], runtime("isolatency"), anything)
    assert [choice.format.name for choice in space.choices["x"]] == ["bf16", "w4a16-g32"]


def test_the_replacement_is_one_that_runs() -> None:
    def no_small_groups(fmt: Format, site: Site) -> str | None:
        return "too small" if 0 < fmt.group < 64 else None

    space = build(_structure(QKV, DOWN), ["w4a16-g64"], ["rtn"], runtime("isolatency"), no_small_groups)
    assert [choice.format.name for choice in space.choices["down"]] == ["bf16", "w4a16"]


def test_what_is_dropped_says_why() -> None:
    def kernels(fmt: Format, site: Site) -> str | None:
        return "no kernel for 3 bits" if fmt.bits == 3 else None

    space = build(_structure(QKV, DOWN), ["w4a16-g32", "w3a16-g32"], ["rtn", "awq"], runtime("isolatency"), kernels)
    assert len(space.choices["qkv"]) == 3
    assert space.dropped["qkv"] == {"w3a16-g32": "no kernel for 3 bits"}
    assert set(space.dropped["down"]) == {"w3a16-g32", "awq:format=w4a16-g32"}
    with pytest.raises(KeyError, match="no kernel for 3 bits"):
        space.choice("down", Decision.of("rtn", format="w3a16-g32"))
    with pytest.raises(KeyError, match="choices are none, rtn"):
        space.choice("down", Decision.of("rtn", format="w8a16"))
    text = space.describe()
    assert "2 sites, 5 choices" in text
    assert "not at 2 sites like qkv: w3a16-g32: no kernel for 3 bits" in text
    assert "not at down: awq:format=w4a16-g32: awq: down follows no norm" in text


def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue with `sparse`, which is simulated and follows norms only."""
    recipe = replace(catalogue.METHODS["rtn"], name="sparse", sites=norm_site, simulated="no kernel adds sparse rows")
    monkeypatch.setitem(catalogue.METHODS, "sparse", recipe)  # type: ignore[arg-type]


def test_what_is_simulated_is_refused_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _simulated(monkeypatch)
    message = r"sparse is simulated \(no kernel adds sparse rows\), so it has no latency .*leave it out of --methods, `search materialize`"
    for methods in (["rtn", "sparse"], ["sparse:fitter=mse"]):
        with pytest.raises(ValueError, match=message):
            build(_structure(QKV, DOWN), ["w4a16-g32"], methods, runtime("isolatency"), anything)


def test_settings_that_are_simulated_are_dropped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method may be simulated in some formats only: these are no choices, the others are."""
    plan = catalogue.plan

    def partly(site: Site, decision: Decision) -> Plan:
        found = plan(site, decision)
        return replace(found, simulated="no kernel has 3 bits") if found.format.bits == 3 else found

    monkeypatch.setattr(catalogue, "plan", partly)
    space = build(_structure(QKV, DOWN), ["w4a16-g32", "w3a16-g32"], ["rtn"], runtime("isolatency"), anything)
    assert [choice.format.name for choice in space.choices["down"]] == ["bf16", "w4a16-g32"]
    assert space.dropped["down"] == {"rtn:format=w3a16-g32": "no latency of its own: no kernel has 3 bits"}
    with pytest.raises(KeyError, match="no kernel has 3 bits"):
        space.choice("down", Decision.of("rtn", format="w3a16-g32"))


def test_a_site_with_nothing_but_dense_is_fine_and_a_model_without_choices_is_not() -> None:
    conv = _site("conv", 192, transposed=True)
    space = build(_structure(QKV, conv), DEFAULT_FORMATS["vllm"], ["rtn"], runtime("vllm"), anything)
    assert [choice.decision for choice in space.choices["conv"]] == [DENSE]
    with pytest.raises(ValueError, match=r"runtime 'vllm'.*stored transposed"):
        build(_structure(conv), DEFAULT_FORMATS["vllm"], ["rtn"], runtime("vllm"), anything)
    with pytest.raises(ValueError, match="name no compression"):
        build(_structure(QKV), ["bf16"], ["rtn"], runtime("isolatency"), anything)
    with pytest.raises(ValueError, match="Tiny has experts"):
        build(_structure(QKV, _site("x", 192, kind="expert_down")), ["w8a16"], ["rtn"], runtime("vllm"), anything)
    with pytest.raises(ValueError, match=r"Tiny is not exported to llama\.cpp, only LlamaForCausalLM, .* are"):
        build(_structure(QKV), ["w8a8-g32"], ["rtn"], runtime("llama.cpp"), anything)
    with pytest.raises(ValueError, match="did you mean gptq"):
        build(_structure(QKV), ["w8a16"], ["gptw"], runtime("isolatency"), anything)


@pytest.mark.parametrize(
    ("name", "fmt", "site", "reason"),
    [
        ("vllm", "w4a16-g64", QKV, None),
        ("vllm", "w8a16", QKV, None),
        ("vllm", "w8a8-token", QKV, None),
        ("vllm", "bf16", _site("x", 100, transposed=True), None),
        ("vllm", "w4a16-g64-asym", QKV, "vllm: only symmetric grids"),
        ("vllm", "w3a16-g64", QKV, "vllm: 3-bit weights with 16 activations are not among its kernels"),
        ("vllm", "w4a8-g64", QKV, "vllm: 4-bit weights with 8-group activations are not among its kernels"),
        ("vllm", "w4a16-g96", QKV, "vllm: group 96 is not one of channel, 32, 64, 128"),
        ("vllm", "w8a8-token-g64", QKV, "vllm: group 64 is not one of channel"),
        ("vllm", "w4a16-g128", QKV, "group 128 does not divide 192 inputs"),
        ("vllm", "w8a8-token", _site("x", 100), "vllm: 100 inputs and 80 outputs have to be multiples of 16"),
        ("vllm", "w4a16", _site("x", 192, kind="expert_down"), "vllm gets no models with experts from here"),
        ("vllm-cpu", "w8a16", QKV, "vllm-cpu: 8-bit weights with 16 activations are not among its kernels"),
        ("llama.cpp", "w4a8-g32-asym", QKV, None),
        ("llama.cpp", "q4_k", _site("x", 512), None),
        ("llama.cpp", "q4_k", QKV, "group 256 does not divide 192 inputs"),
        ("llama.cpp", "w8a8-token", _site("x", 80), "llama.cpp: Q8_0 has blocks of 32 inputs, which 80 inputs do not fill"),
        ("isolatency", "w2a8-g16-asym", _site("x", 176, transposed=True), None),
    ],
)
def test_runtimes_say_what_they_cannot_run(name: str, fmt: str, site: Site, reason: str | None) -> None:
    assert runtime(name).supports(parse_format(fmt), site) == reason


@pytest.mark.parametrize("fmt", ["w3a16-g16-bi3-asym", "w4a16-g16-bi3"])
def test_nothing_runs_or_loads_scales_that_rows_share_a_second_level_of(fmt: str) -> None:
    form, site = parse_format(fmt), _site("x", 512, 512)
    foreign = [found.supports(form, site) for name, found in RUNTIMES.items() if name != "isolatency"]
    assert all(foreign) and not has_kernel(form)
    able = frozenset({"avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "sm80", "sm89", "sm90", "fp8"})
    machine = Target("some", "x86_64", False, "bf16", 4, 1 << 34, able, "0" * 16, "all that kernels ask for")
    for target in (machine, replace(machine, device="cuda")):
        assert supported(form, 512, 512, 64, target) == [] != supported(parse_format("w4a16-g32"), 512, 512, 64, target)


def test_default_formats_are_what_their_runtime_runs() -> None:
    site = _site("x", 256, 512)
    assert set(DEFAULT_FORMATS) == set(RUNTIMES)
    assert default_formats("isolatency", ["decode"]) == DEFAULT_FORMATS["isolatency"]
    assert set(default_formats("isolatency", ["decode", "prefill"])) - set(DEFAULT_FORMATS["isolatency"]) == {"w8a8-token"}
    assert default_formats("vllm", ["prefill"]) == DEFAULT_FORMATS["vllm"]
    for name, formats in DEFAULT_FORMATS.items():
        assert [runtime(name).supports(parse_format(fmt), site) for fmt in formats] == [None] * len(formats)
        assert all(catalogue.refuses(site, Decision.of("rtn", format=fmt)) is None for fmt in formats)


def test_an_unknown_runtime_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown runtime 'tensorrt-llm'; use one of isolatency, transformers, vllm"):
        runtime("tensorrt-llm")


def test_scales_for_other_rows_are_no_choice_where_these_may_not_take_them() -> None:
    """What feeds down is chosen apart from it, so that every choice there has to take the scale."""
    up = _site("up", 192, d_out=160, kind="up")
    down = replace(DOWN, feed=Feed("up.0", 0, 160, 160))
    formats = ["w4a16-g32", "fp8-tensor"]
    space = build(_structure(up, down), formats, ["rtn", "awq"], runtime("isolatency"), anything)
    reason = "its scale goes to up, whose choice fp8-tensor cannot take it"
    assert space.dropped["down"] == {"awq:format=w4a16-g32": reason, "awq:format=fp8-tensor": reason}
    assert [choice.decision.method for choice in space.choices["down"]] == ["none", "rtn", "rtn"]

    space = build(_structure(up, down), formats[:1], ["rtn", "awq", "awq:fold=norms"], runtime("isolatency"), anything)
    assert [choice.decision.label for choice in space.choices["down"]] == [
        "none",
        "rtn:format=w4a16-g32",
        "awq:format=w4a16-g32",
    ]
    assert "down follows no norm" in space.dropped["down"]["awq:fold=norms,format=w4a16-g32"]
