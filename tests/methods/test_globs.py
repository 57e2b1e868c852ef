"""Globs against a slow, obvious reading, the regular expressions of earlier policy files, and names and patterns of any size."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from methods.globs import LONGEST, Glob, GlobError, either, from_regex, is_regex, numbers

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.7.down_proj")
NAMES = [f"model.layers.{block}.{leaf}" for block in (0, 1, 2, 5, 9, 10, 11, 17, 29, 105) for leaf in LEAVES] + [
    "lm_head",
    "",
    ".",
]


def obvious(pattern: str, name: str) -> bool:
    """The dialect without alternatives and ranges, by definition."""
    if not pattern:
        return not name
    if pattern.startswith("**"):
        return any(obvious(pattern[2:], name[n:]) for n in range(len(name) + 1))
    if pattern[0] == "*":
        longest = next((n for n, c in enumerate(name) if c == "."), len(name))
        return any(obvious(pattern[1:], name[n:]) for n in range(longest + 1))
    fits = name != "" and (name[0] != "." if pattern[0] == "?" else name[0] == pattern[0])
    return fits and obvious(pattern[1:], name[1:])


def test_stars_and_question_marks_match_as_defined() -> None:
    draw = random.Random(0)
    patterns = {"".join(draw.choices(["a", "b", ".", "*", "**", "?"], k=draw.randrange(6))) for _ in range(400)}
    names = ["".join(letters) for n in range(5) for letters in itertools.product("ab.", repeat=n)]
    for pattern in sorted(patterns):
        glob = Glob(pattern)
        assert [name for name in names if glob.matches(name)] == [name for name in names if obvious(pattern, name)], pattern


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.*.mlp.{up,down}_proj", r"model\.layers\.[^.]*\.mlp\.(up|down)_proj"),
        ("model.layers.{0..2,10}.**", r"model\.layers\.(0|1|2|10)\..*"),
        ("**.{9..11}.self_attn.[qk]_proj", r".*\.(9|10|11)\.self_attn\.[qk]_proj"),
        ("model.layers.?[!05].**", r"model\.layers\.[^.][^05]\..*"),
        ("model.layers.1[0-57].*.*", r"model\.layers\.1[0-57]\.[^.]*\.[^.]*"),
        ("**.experts.{0..}.down_proj", r".*\.experts\.[0-9]+\.down_proj"),
        (
            "model.layers.{1,2{,9}}.mlp{.up,.experts.*.down}_proj",
            r"model\.layers\.(1|2|29)\.mlp(\.up|\.experts\.[^.]*\.down)_proj",
        ),
        ("{lm_head,}", r"(lm_head)?"),
        ("model.layers.?.mlp.{down..up,up_proj}", r"model\.layers\.[^.]\.mlp\.up_proj"),
        ("[]x]", r"[\]x]"),
        ("lm[_-]head", r"lm[_-]head"),
    ],
)
def test_the_dialect(pattern: str, expected: str) -> None:
    names = [*NAMES, "]", "x"]
    assert (
        [name for name in names if Glob(pattern).matches(name)]
        == [name for name in names if re.fullmatch(expected, name)]
        != []
    )


@pytest.mark.parametrize(
    ("regex", "glob"),
    [
        (r"model\.layers\.\d+\.self_attn\.o_proj", "model.layers.{0..}.self_attn.o_proj"),
        (
            r"model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj)|mlp\.(gate_proj|up_proj|down_proj))",
            "model.layers.{0..}.{self_attn.{q_proj,k_proj,v_proj},mlp.{gate_proj,up_proj,down_proj}}",
        ),
        (r"model\.layers\.(5|9|17)\.mlp\.(gate_proj|up_proj)", "model.layers.{5,9,17}.mlp.{gate_proj,up_proj}"),
        (r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj", "model.layers.{0..}.mlp.experts.{0..}.down_proj"),
        (r".*down_proj", "**down_proj"),
        (r"^.*\.(?:0|1[01])\.mlp\..*$", "**.{0,1[01]}.mlp.**"),
        (r"model.layers.\d.[^.]*.q_proj|lm_head", None),
        (r"lm\_head", "lm_head"),
        (r"model\.layers\.[0-9]+\..*", "model.layers.{0..}.**"),
        (r"model\.layers\.\d\.[^.]*\.q_proj", "model.layers.[0-9].*.q_proj"),
    ],
)
def test_regular_expressions_of_earlier_files_say_the_same(regex: str, glob: str | None) -> None:
    assert is_regex(regex)
    if glob is None:
        with pytest.raises(GlobError, match="write a glob instead"):
            from_regex(regex)
        return
    assert from_regex(regex) == glob and not is_regex(glob)
    found = Glob(glob)
    assert [name for name in NAMES if found.matches(name)] == [name for name in NAMES if re.fullmatch(regex, name)] != []


@pytest.mark.parametrize(
    "regex", [r"(a|b)+", r"(a|b", r"a|b)", r"a+", r"\w+", r"(?=a)a", r"a\b", r"\.{2}", r"[^a]x(", r"x$y", r"(a*)*\."]
)
def test_other_regular_expressions_are_refused(regex: str) -> None:
    assert is_regex(regex)
    with pytest.raises(GlobError, match="glob") as raised:
        from_regex(regex)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a[b", r"\[ is not closed"),
        ("a[!]", r"\[ is not closed"),
        ("{a,b", r"{ is not closed"),
        ("a}", "} closes nothing"),
        ("a]", "] closes nothing"),
        ("[z-a]", "z-a is no range of characters"),
        ("{7..3}", "7..3 is no range"),
        ("{0..99999999}", "is no range of at most"),
        ("{3..}", "nor 0.., which is any number"),
        ("{" * 17 + "}" * 17, "nested more than 16 deep"),
        ("a" * (LONGEST + 1), "longer than"),
    ],
)
def test_what_is_no_glob_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(GlobError, match=said) as raised:
        Glob(pattern)
    assert len(str(raised.value)) < 300


def test_long_names_and_many_stars_return() -> None:
    name = "model.layers." + "0" * 10_000 + ".mlp.down_proj"
    assert Glob("**.{0..}.mlp.*").matches(name)
    assert Glob("**0" * 50 + "**_proj").matches(name)
    assert not Glob("**0" * 50 + "**_head").matches(name)
    assert not Glob("{*,{*,?}*,{0..}}{*,0*}x").matches("0" * 10_000)
    assert Glob(either([f"layers.{n}.mlp" for n in range(3000)])).matches("layers.2999.mlp")


def test_numbers_are_ranges_where_they_follow_each_other() -> None:
    assert [numbers(found) for found in ([5], [3, 4], [0, 1, 2, 3, 7, 9, 10, 11])] == ["5", "{3,4}", "{0..3,7,9..11}"]
    found = Glob(f"b.{numbers([0, 1, 2, 3, 7, 9, 10, 11])}")
    assert [n for n in range(30) if found.matches(f"b.{n}")] == [0, 1, 2, 3, 7, 9, 10, 11]
