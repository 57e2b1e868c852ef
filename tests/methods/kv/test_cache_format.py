"""Names, refusals and sizes of key/value-cache formats."""

from __future__ import annotations

import subprocess
import sys

import pytest

from methods.catalogue import MODEL_METHODS
from methods.kv.format import CacheFormat, n_outliers, parse_cache_format
from methods.model.structure import Structure
from methods.policy import Decision, Policy
from methods.recipes.cache import KV_CACHE

NAMES = (
    *(
        "kv-fp32",
        "kv-bf16",
        "kv-fp16",
        "kv-fp8",
        "kv-fp8-head",
        "kv-fp8-tensor-w32-s1",
        "kv-int8",
        "kv-int4-g64",
        "kv-int3-rot",
    ),
    *(
        "kv-int-k8v4-g16-smooth-w7-s4",
        "kv-kivi2-g32-w128",
        "kv-kivi-k4v2-g8-rot",
        "kv-kvquant3-s1",
        "kv-turbo2",
        "kv-turbo-k4v3",
    ),
)


def structure(dtype: str = "bf16", n_kv_heads: int = 3, head_dim: int = 64) -> Structure:
    blocks = tuple(f"model.layers.{i}" for i in range(5))
    return Structure("Toy", blocks, (), "head", "embed", True, 576, 128, 9, n_kv_heads, head_dim, dtype, 1)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_back(name: str) -> None:
    assert parse_cache_format(name).name == name


@pytest.mark.parametrize(
    "name",
    (
        *(
            "kv-int5",
            "int4",
            "kv-int4-g12",
            "kv-kivi2",
            "kv-kivi2-g32-w100",
            "kv-kvquant8",
            "kv-fp8-g64",
            "kv-bf16-w8",
            "kv-turbo8",
        ),
        *(
            "kv-int-k4v4",
            "kv-int4-rot-smooth",
            "kv-turbo4-rot",
            "kv-kvquant3-smooth",
            "kv-int4-w08",
            "kv-fp8-token",
            "kv-int4-s1-w2",
        ),
    ),
)
def test_what_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cache format"):
        parse_cache_format(name)


@pytest.mark.parametrize(
    ("name", "bits"),
    (
        ("kv-bf16", 16.0),
        ("kv-fp8", 8 + 16 / 64),
        ("kv-fp8-tensor", 8.0),
        ("kv-int4-g32", 4 + 32 / 32),
        ("kv-int-k8v4", 6 + 32 / 64),
        ("kv-turbo3", 3 + 16 / 64),
        ("kv-kvquant3", 3 + (2 * 32 + 2 * 32 + 32) / 192 / 2),
        # Context 1,000: 896 keys in 7 blocks of 128 and 104 whole; 872 values packed and 128 whole.
        ("kv-kivi2-g32-w128", (3 * (896 + 872) + 16 * (104 + 128)) / 2000),
        # 10 whole sinks and 100 whole newest tokens.
        ("kv-int4-w100-s10", (4.5 * 890 + 16 * 110) / 1000),
    ),
)
def test_bits_per_element_by_hand(name: str, bits: float) -> None:
    assert parse_cache_format(name).bits_per_element(structure(), 1000) == pytest.approx(bits, rel=1e-6)


def test_a_short_context_is_all_window() -> None:
    fmt = parse_cache_format("kv-kivi2-g32-w128-s4")
    assert fmt.bits_per_element(structure(), 100) == 16
    assert fmt.size_bytes(structure("fp32"), 3, 100) == 3 * 5 * 2 * 100 * 192 * 4
    assert fmt.size_bytes(structure(), 2, 0) == 0


def test_a_sliding_layer_holds_its_window_only() -> None:
    fmt = parse_cache_format("kv-int8")
    full = fmt.size_bytes(structure(), 1, 1000)
    assert fmt.size_bytes(structure(), 1, 1000, [None, 101, None, 101, None]) == full * (3 * 1000 + 2 * 100) // 5000


def test_outliers_are_one_in_a_hundred() -> None:
    assert [n_outliers(width) for width in (16, 192, 1024, 4096)] == [1, 2, 10, 41]


def test_models_that_a_format_does_not_fit_are_refused() -> None:
    assert parse_cache_format("kv-int4-g48").refuses(structure()) == (
        "kv-int4-g48: group=48 does not divide head_dim=64; use one of [8, 16, 32, 64]"
    )
    assert "heads of 20 channels" in str(parse_cache_format("kv-turbo4").refuses(structure(head_dim=20)))
    assert "16-bit indices" in str(parse_cache_format("kv-kvquant4").refuses(structure(n_kv_heads=600)))
    assert all(parse_cache_format(name).refuses(structure()) is None for name in NAMES)


def test_the_decision_names_a_format_and_nothing_else() -> None:
    decision = Decision.of("kv-cache", format="kv-int4-g64")
    assert Policy.from_canonical(Policy(model=(decision,)).canonical()).model == (Decision.parse(decision.label),)
    assert MODEL_METHODS["kv-cache"] is KV_CACHE
    assert KV_CACHE.resolve(dict(decision.knobs)) == {"format": "kv-int4-g64"}
    for knobs, words in (
        ({}, "is missing"),
        ({"format": "w4a16"}, "cache format"),
        ({"format": "kv-int8", "bits": 4}, "unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            KV_CACHE.resolve(knobs)


def test_the_decision_costs_what_the_format_stores() -> None:
    cost = KV_CACHE.cost(structure(), {"format": "kv-int8"}, batch=2, context=512)
    assert cost.size_bytes == 2 * 5 * 2 * 512 * (192 + 3 * 4)
    assert cost.bits_per_element == pytest.approx(8.5) and cost.ratio == pytest.approx(8.5 / 16)
    sliding = KV_CACHE.cost(structure(), {"format": "kv-bf16"}, 1, 512, [65] * 5)
    assert sliding.ratio == 1 and sliding.size_bytes == 5 * 2 * 64 * 192 * 2
    with pytest.raises(ValueError, match="does not divide"):
        KV_CACHE.cost(structure(), {"format": "kv-int4-g48"}, 1, 512)
    assert KV_CACHE.refuses(structure(), {"format": "kv-int4-g48"})
    assert KV_CACHE.simulated({"format": "kv-int8"}) and not KV_CACHE.simulated({"format": "kv-bf16"})
    assert KV_CACHE.published({"format": "kv-kivi2-g32-w128"}).ref == "arXiv 2402.02750"


def test_formats_and_the_decision_import_no_torch() -> None:
    code = "import methods.kv.format, methods.recipes.cache, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_value_must_make_sense_whoever_makes_it() -> None:
    with pytest.raises(ValueError, match="only int and kivi have groups"):
        CacheFormat("turbo", 4, 4, group=16)
    with pytest.raises(ValueError, match="negative"):
        CacheFormat("int", 4, 4, window=-1)
    with pytest.raises(ValueError, match="dense="):
        CacheFormat("dense", 16, 16, dense="fp32")
