"""What of the CUDA kernels can be told without a device: layouts, refusals, how products are divided, the gate and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods.formats.format import parse_format
from methods.formats.numerics import decode
from profilers.kernels import check_device, gate
from profilers.kernels.catalogue import CUDA_KERNELS, KERNELS, kernel, kernels, refusals, supported
from profilers.kernels.dense import Dense
from profilers.kernels.fp8 import Fp8
from profilers.kernels.kernel import hash_of
from profilers.kernels.launch import Launch, Meeting, next_power, parts
from profilers.kernels.sparse24 import Sparse24, is_24
from profilers.kernels.tinygemm import inner_tiles, nibbles
from profilers.kernels.triton_grouped import FEW, TritonGrouped
from profilers.kernels.words import PLANES, UNIT, Words, pack, refuses, unpack
from profilers.target import Target, cuda_capabilities, local_cpu, local_cuda

CPU = local_cpu(1)


def absent_gpu(major: int = 8, minor: int = 0, **changes: object) -> Target:
    capabilities = cuda_capabilities((major, minor))
    gpu = replace(
        CPU, name="gpu", arch=f"sm{major}{minor}", present=False, compute_dtype="bf16", capabilities=capabilities, device="cuda"
    )
    return replace(gpu, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_planes_hold_codes_where_they_are_said_to(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 96), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, 96 * bits // 32)
    for row, k in ((0, 0), (1, 37), (2, 95), (2, 63)):
        unit, slot, place = k // UNIT, k % UNIT // bits, k % bits
        assert int(words[row, unit * bits + place]) >> (slot * bits) & (2**bits - 1) == int(codes[row, k])
    assert torch.equal(unpack(words, bits, 96), codes)


@pytest.mark.parametrize(
    "name",
    ("w2a16-g32", "w3a16-g64-asym", "w5a8-g32", "w8a16-asym", "nf4", "nf4-dq", "mxfp4a16", "nl4a16-g32", "lut4a16-g64"),
)
def test_words_decode_to_the_payload(name: str) -> None:
    fmt = parse_format(name)
    assert refuses(fmt, 256) is None
    payload = check_device.payload_of(fmt, 9, 256)
    words = Words.of(fmt, payload, "cpu")
    assert torch.equal(words.decode(), decode(fmt, payload))
    assert torch.equal(words.clone().decode(), words.decode())
    codes = payload["codes"].numel() * fmt.bits / 8
    assert words.size_bytes() - codes == sum(
        part.numel() * part.element_size() for part in (words.scale, words.offset, words.levels)
    )


def test_formats_that_words_cannot_hold_are_refused() -> None:
    assert "by row" in (refuses(parse_format("bf16"), 64) or "")
    assert "by row" in (refuses(parse_format("w7a16-g32"), 64) or "")
    assert "by row" in (refuses(parse_format("lut4a16-whole"), 64) or "")
    assert "multiples of 32" in (refuses(parse_format("w4a16-g16"), 64) or "")
    assert "multiples of 32" in (refuses(parse_format("w4a16"), 48) or "")
    assert "rounded to int8" in (refuses(parse_format("w4a4-g32"), 64) or "")
    assert "rounded to int8" in (refuses(parse_format("w8a8-tensor"), 64) or "")
    assert refuses(parse_format("w4a8-token-g32"), 64) is None
    assert all(high in (0, 1, 2) and bits == low + high for bits, (low, high) in PLANES.items())


@pytest.mark.parametrize(
    ("name", "few", "many"),
    (
        ("bf16", {"dense"}, {"dense"}),
        ("bf16-2of4", {"dense", "sparse24"}, {"dense", "sparse24"}),
        ("bf16-r64", {"low-rank"}, {"low-rank"}),
        ("w4a16-g64", {"triton-few", "triton-many", "tinygemm", "gemlite"}, {"triton-many", "tinygemm", "gemlite"}),
        ("w3a16-g32-asym", {"triton-few", "triton-many"}, {"triton-many"}),
        ("w8a16", {"triton-few", "triton-many", "int8pack", "gemlite"}, {"triton-many", "int8pack", "gemlite"}),
        ("w8a8-token", {"triton-few", "triton-int8", "triton-many"}, {"triton-int8", "triton-many"}),
        ("nf4", {"triton-few", "triton-many", "bitsandbytes"}, {"triton-many", "bitsandbytes"}),
        ("fp8-token", {"scaled-mm"}, {"scaled-mm"}),
    ),
)
def test_which_kernels_obey_a_format_on_a_gpu(name: str, few: set[str], many: set[str]) -> None:
    fmt, gpu = parse_format(name), absent_gpu(9)
    assert {entry.name for entry in supported(fmt, 576, 1536, 1, gpu)} == few
    assert {entry.name for entry in supported(fmt, 576, 1536, FEW + 1, gpu)} == many


def test_devices_do_not_share_kernels_and_reasons_are_given() -> None:
    gpu, fmt = absent_gpu(), parse_format("w4a16-g64")
    assert kernels(gpu) is CUDA_KERNELS and kernels(CPU) is KERNELS
    assert refusals(fmt, 64, 64, 1, gpu).keys() | {entry.name for entry in supported(fmt, 64, 64, 1, gpu)} == {
        entry.name for entry in CUDA_KERNELS
    }
    for entry in CUDA_KERNELS:
        if entry.name not in ("dense", "int8pack", "low-rank"):
            for name in check_device.FORMATS:
                assert entry.supports(parse_format(name), 64, 128, 1, CPU) is not None, entry.name
    assert "needs fp8" in (Fp8().supports(parse_format("fp8-token"), 64, 64, 1, gpu) or "")
    assert "needs sm80" in (TritonGrouped("many").supports(fmt, 64, 64, 1, absent_gpu(7, 5)) or "")
    assert "at most 8" in (TritonGrouped("few").supports(fmt, 64, 64, 9, gpu) or "")
    assert "not on cuda" in (Dense(prepacked=True).supports(parse_format("bf16"), 64, 64, 1, gpu) or "")
    assert kernel("triton-int8") is CUDA_KERNELS[2]
    with pytest.raises(KeyError, match="triton-few"):
        kernel("nothing")


def test_a_missing_package_is_a_reason_where_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    here = absent_gpu(present=True)
    assert "triton, which is not installed" in (TritonGrouped("few").supports(parse_format("nf4"), 64, 64, 1, here) or "")
    assert TritonGrouped("few").supports(parse_format("nf4"), 64, 64, 1, absent_gpu()) is None


def test_inputs_are_split_until_there_is_work_for_all_and_no_further() -> None:
    assert parts(n_tiles=64, n_steps=100, n_processors=132) == 4
    assert parts(n_tiles=300, n_steps=100, n_processors=132) == 1
    assert parts(n_tiles=1, n_steps=100, n_processors=132) == 16
    assert parts(n_tiles=1, n_steps=3, n_processors=132) == 3
    assert [next_power(count) for count in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert Launch(16, 64, 64, 1).tiles(17, 64) == (2, 1)


def test_parts_meet_in_memory_that_stays_zero() -> None:
    meeting, out = Meeting(), torch.empty(33, 100)
    room, arrived = meeting.memory(Launch(16, 64, 64, 4), out, 33)
    assert room.numel() == 4 * 33 * 100 and arrived.tolist() == [0] * 6
    assert meeting.memory(Launch(16, 64, 64, 4), out, 33)[1] is arrived
    assert meeting.memory(Launch(16, 64, 64, 1), out, 33)[0].numel() == 0


def test_tinygemm_packs_what_torch_unpacks() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [7, 8, 9, 10]], dtype=torch.uint8)
    assert nibbles(codes).tolist() == [[0x12, 0xF0], [0x78, 0x9A]]
    assert [inner_tiles(k) for k in (576, 1536, 192, 96, 32)] == [4, 8, 4, 2, 2]
    for k in (576, 96):
        meta = nibbles(torch.zeros(16, k, dtype=torch.uint8)).to("meta")
        packed = torch.ops.aten._convert_weight_to_int4pack(meta, inner_tiles(k))
        assert packed.shape == (2, k // (16 * inner_tiles(k)), 32, inner_tiles(k) // 2)


def test_sparse24_takes_pruned_weights_alone() -> None:
    fmt = parse_format("bf16-2of4")
    whole, kept = (check_device.payload_of(parse_format(name), 16, 64) for name in ("bf16", "bf16-2of4"))
    assert is_24(kept["weight"]) and not is_24(whole["weight"])
    with pytest.raises(ValueError, match="prune them first"):
        Sparse24().prepare(fmt, whole, absent_gpu())
    for other in ("bf16", "bf16-s50", "bf16-1of4", "fp16-2of4"):
        assert "bf16-2of4 only" in (Sparse24().supports(parse_format(other), 64, 64, 1, absent_gpu()) or "")


class _Lazy:
    """A kernel that leaves the last output of every token unwritten."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), len(self.weight))
        y[:, :-1] = x @ self.weight[:-1].T
        return y

    def dequant(self) -> Tensor:
        return self.weight

    def size_bytes(self) -> int:
        return 0

    def clone(self) -> _Lazy:
        return self


def test_outputs_that_were_not_written_are_seen() -> None:
    payload = {"weight": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))}
    x = torch.ones(2, 32)
    torch.zeros(2, 8)  # plausible values in memory that may be handed out again
    assert gate.check(_Lazy(payload["weight"]), parse_format("fp32"), payload, x) == "returned NaN or infinity on finite input"
    assert not torch.are_deterministic_algorithms_enabled()
    with gate.poisoned():
        assert torch.empty(3).isnan().all() and int(torch.empty(1, dtype=torch.int8)) == 127


def test_the_command_tells_of_every_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_device, "SHAPES", ((40, 96),))
    cells = list(check_device.check_device(CPU, ("bf16", "w4a16-g32", "w4a16-g64"), ((40, 96),), (1, 17)))
    assert {cell.format for cell in cells} == {"bf16", "w4a16-g32"}
    assert {(cell.kernel, cell.m) for cell in cells if cell.status == "ok"} >= {("dense", 1), ("grouped", 17), ("decoded", 17)}
    assert all(cell.reason for cell in cells if cell.status != "ok")
    out = tmp_path / "gate.json"
    monkeypatch.setattr(check_device, "local_cuda", lambda: None)
    assert check_device.main(["--out", str(out)]) == 2 and not out.exists()
    assert "no CUDA device" in capsys.readouterr().err
    assert check_device.main(["--device", "cpu", "--formats", "fp32", "--shapes", "40x96", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["fingerprint"] == local_cpu().fingerprint and {cell["status"] for cell in record["cells"]} == {"ok"}


class _Broken:
    """A kernel that cannot run, or that is wrong."""

    name = "broken"
    source_hash = hash_of(__file__)

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def supports(self, *_: object) -> None:
        return None

    def prepare(self, fmt: object, payload: dict[str, Tensor], *_: object, **__: object) -> _Lazy:
        if self.error:
            raise self.error
        return _Lazy(payload["weight"].float())


def test_kernels_that_cannot_run_or_are_wrong_are_told_of() -> None:
    fmt = parse_format("bf16")
    payload = check_device.payload_of(fmt, 8, 32)
    failed = check_device.check_cell(_Broken(RuntimeError("no operator\nfor it")), fmt, payload, CPU, 1)  # type: ignore[arg-type]
    assert (failed.status, failed.reason) == ("failed", "no operator")
    wrong = check_device.check_cell(_Broken(None), fmt, payload, replace(CPU, compute_dtype="fp32"), 1)  # type: ignore[arg-type]
    assert wrong.status == "wrong" and "NaN" in wrong.reason
    with pytest.raises(ZeroDivisionError):
        check_device.check_cell(_Broken(ZeroDivisionError()), fmt, payload, CPU, 1)  # type: ignore[arg-type]


_WITHOUT = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import methods, profilers
for package in (methods, profilers):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name != "profilers.kernels.triton_code":
            importlib.import_module(module.name)
from profilers.kernels.check_device import main
sys.exit(main(["--device", "cpu", "--formats", "fp32", "--shapes", "40x96", "--out", sys.argv[2]]))
"""


def test_methods_and_profilers_need_torch_numpy_and_pandas_alone(tmp_path: Path) -> None:
    absent = "transformers,scipy,pyarrow,sklearn,lightgbm,optuna,ray,safetensors,gguf,yaml,matplotlib,triton,lm_eval"
    out = tmp_path / "gate.json"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT, absent, str(out)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text())["cells"]


@pytest.mark.gpu
def test_every_kernel_is_right_on_the_device() -> None:
    target = local_cuda()
    assert target is not None
    cells = list(check_device.check_device(target, shapes=((192, 576), (576, 1536)), tokens=(1, 3, 16, 33)))
    assert not [cell for cell in cells if cell.status in ("wrong", "failed")]
    assert {cell.kernel for cell in cells if cell.status == "ok"} >= {
        "dense",
        "triton-few",
        "triton-many",
        "triton-int8",
        "tinygemm",
    }
