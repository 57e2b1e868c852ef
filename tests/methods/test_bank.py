"""The bank gives back what was put, or says clearly that it cannot."""

import weakref
from pathlib import Path

import pytest
import torch

from methods.bank import Bank, DamagedEdit, Kept
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed, decode_grid, payload_bits
from methods.formats.sides import columns, low_rank
from methods.method import Edit
from methods.policy import Decision
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest

SITE = "model.layers.0.self_attn.q_proj+k_proj"
FORMATS = ["fp32", "bf16", "fp16", "w2a16-g16", "w3a16-g48-asym", "w4a8-g48", "w8a8-token"]
OTHER_FORMATS = [
    *("w7a6-token", "e2m3a16-b4x48-fp32", "nvfp4a4", "e2m1a16-g48-e8m0", "nf4a16-g48-dq", "tern2a16-whole", "bin1a16"),
    *("bcq3a16-g48-asym", "lut3a16-g48", "lut3a16-whole", "w4a16-g16-u4", "w3a16-g16-u6", "w4a8-g48-fp16-asym"),
]


def edit(fmt: str, seed: int = 0) -> Edit:
    """Two layers whose codes do not fill whole bytes at 3 bits, and a norm."""
    generator, parsed, linears = torch.Generator().manual_seed(seed), parse_format(fmt), {}
    for name, d_out in (("model.q", 5), ("model.k", 3)):
        weight = torch.randn(d_out, 144, generator=generator)
        cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(parsed.dense, torch.float32)
        payload = {"weight": weight.to(cast)} if parsed.dense else nearest(weight, parsed, minmax(weight, parsed))
        linears[name] = Compressed.of(parsed, payload)
    return Edit(linears, {"model.norm.weight": torch.randn(144, generator=generator).bfloat16()})


def same(left: Edit, right: Edit) -> bool:
    if list(left.linears) != list(right.linears) or set(left.tensors) != set(right.tensors):
        return False
    tensors = [(left.tensors[name], right.tensors[name]) for name in left.tensors]
    for name, compressed in left.linears.items():
        other = right.linears[name]
        if compressed.format != other.format or set(compressed.payload) != set(other.payload):
            return False
        tensors += [(compressed.dense, other.dense)]
        tensors += [(compressed.payload[part], other.payload[part]) for part in compressed.payload]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("fmt", [*FORMATS, *OTHER_FORMATS])
def test_round_trip_is_bit_for_bit_and_packed(tmp_path: Path, fmt: str) -> None:
    bank, decision, stored = Bank(tmp_path / "bank"), Decision.of("rtn", format=fmt), edit(fmt)
    assert not bank.has(SITE, decision)
    bank.put(SITE, decision, stored)
    assert bank.has(SITE, decision)
    assert same(bank.get(SITE, decision), stored)
    bits = sum(payload_bits(c.format, c.payload) for c in stored.linears.values()) + 16 * 144
    header = int.from_bytes(bank.path(SITE, decision).read_bytes()[:8], "little") + 8
    n_packed = sum(part in c.format.widths for c in stored.linears.values() for part in c.payload)
    assert bank.size_bytes() - header <= (bits + 7 * n_packed) / 8


@pytest.mark.parametrize("fmt", ["q4_k", "q3_k", "q2_k"])
def test_super_blocks_and_what_stands_beside_a_grid_round_trip(tmp_path: Path, fmt: str) -> None:
    parsed, generator = parse_format(fmt), torch.Generator().manual_seed(1)
    weight = torch.randn(7, 512, generator=generator)
    payload = {
        **nearest(weight, parsed, minmax(weight, parsed)),
        **columns(weight, torch.tensor([3, 400])),
        **low_rank(torch.randn(7, 2, generator=generator), torch.randn(2, 512, generator=generator)),
        "act.scale": torch.rand(1, generator=generator),
    }
    stored, bank = Edit({"model.up": Compressed.of(parsed, payload)}), Bank(tmp_path)
    bank.put("up", Decision.of("rtn", format=fmt), stored)
    found = bank.get("up", Decision.of("rtn", format=fmt))
    assert same(found, stored)
    assert not torch.equal(found.linears["model.up"].dense, decode_grid(parsed, payload))


def test_an_empty_edit_round_trips(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.put(SITE, Decision("none"), Edit())
    assert same(bank.get(SITE, Decision("none")), Edit())


def test_pairs_do_not_mix(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    pairs = [(site, Decision.of("rtn", format=f)) for site in (SITE, "model_layers.0.self_attn.q_proj+k_proj") for f in FORMATS]
    for seed, (site, decision) in enumerate(pairs):
        bank.put(site, decision, edit(str(decision.knob("format")), seed))
    for seed, (site, decision) in enumerate(pairs):
        assert same(bank.get(site, decision), edit(str(decision.knob("format")), seed))
    bank.put(*pairs[0], edit("fp32", 99))
    assert same(bank.get(*pairs[0]), edit("fp32", 99))


def test_names_too_long_for_a_file_system(tmp_path: Path) -> None:
    bank, decision = Bank(tmp_path), Decision.of("rtn", format="w4a8-g48")
    sites = ["model." + "+".join(f"expert_{i}" for i in range(200)) + end for end in ("a", "b")]
    for seed, site in enumerate(sites):
        bank.put(site, decision, edit("w4a8-g48", seed))
    assert all(same(bank.get(site, decision), edit("w4a8-g48", seed)) for seed, site in enumerate(sites))


def test_missing_pair(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="holds no rtn:format=bf16 of"):
        Bank(tmp_path / "absent").get(SITE, Decision.of("rtn", format="bf16"))


@pytest.mark.parametrize("part", ["start", "header", "first tensor", "end", "truncated", "empty"])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, part: str) -> None:
    bank, decision = Bank(tmp_path), Decision.of("rtn", format="w3a16-g48-asym")
    bank.put(SITE, decision, edit("w3a16-g48-asym"))
    path = bank.path(SITE, decision)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    place = {"start": 3, "header": data.index(b"w3a16"), "first tensor": header, "end": len(data) - 1}.get(part)
    if place is not None:
        data[place] ^= 1
    path.write_bytes({"truncated": data[:-5], "empty": b""}.get(part, bytes(data)))
    with pytest.raises(DamagedEdit, match="delete it and compute it again") as damage:
        bank.get(SITE, decision)
    assert damage.value.path == path
    bank.put(SITE, decision, edit("w3a16-g48-asym"))
    assert same(bank.get(SITE, decision), edit("w3a16-g48-asym"))


def test_a_file_of_another_pair_is_refused(tmp_path: Path) -> None:
    bank, one, other = Bank(tmp_path), Decision.of("rtn", format="bf16"), Decision.of("rtn", format="fp16")
    bank.put(SITE, one, edit("bf16"))
    bank.path(SITE, other).write_bytes(bank.path(SITE, one).read_bytes())
    with pytest.raises(DamagedEdit, match="holds rtn:format=bf16"):
        bank.get(SITE, other)


def test_an_interrupted_write_leaves_the_edit_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, decision = Bank(tmp_path), Decision.of("rtn", format="w4a8-g48")
    bank.put(SITE, decision, edit("w4a8-g48"))

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("methods.atomic.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        bank.put(SITE, decision, edit("w4a8-g48", seed=1))
    assert same(bank.get(SITE, decision), edit("w4a8-g48"))
    assert [path.name for path in bank.path(SITE, decision).parent.iterdir()] == [bank.path(SITE, decision).name]


def test_clear_deletes_the_banks_files_only(tmp_path: Path) -> None:
    bank, decision = Bank(tmp_path), Decision.of("rtn", format="bf16")
    assert bank.size_bytes() == 0
    (tmp_path / "notes.txt").write_text("keep")
    bank.put(SITE, decision, edit("bf16"))
    bank.clear()
    assert not bank.has(SITE, decision) and bank.size_bytes() == 0
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_a_policys_edits_are_read_one_by_one_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, decisions = Bank(tmp_path / "bank"), {f"site.{i}": Decision.of("rtn", format="w4a8-g48") for i in range(3)}
    for index, (site, decision) in enumerate(decisions.items()):
        bank.put(site, decision, edit("w4a8-g48", index))
    read: list[str] = []
    get = bank.get
    monkeypatch.setattr(bank, "get", lambda site, decision: read.append(site) or get(site, decision))
    kept = Kept(bank, decisions)
    assert list(kept) == list(decisions) and len(kept) == 3 and not read
    assert same(kept["site.1"], edit("w4a8-g48", 1)) and read == ["site.1"]
    held = [weakref.ref(found.linears["model.q"].dense) for found in kept.values()]
    assert read[1:] == list(decisions) and all(reference() is None for reference in held[:-1])
    bank.path("site.2", decisions["site.2"]).unlink()
    with pytest.raises(KeyError, match=r"site\.2"):
        _ = kept["site.2"]
