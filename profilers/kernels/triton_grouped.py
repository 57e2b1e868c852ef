"""The project's Triton kernels for CUDA: grouped integer grids and 16-level tables, inputs as they are or rounded to int8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.device import Device, processors, refuses_target
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.launch import Launch, Meeting, for_matrices, next_power, parts
from profilers.kernels.triton_rows import SOURCES, quantized
from profilers.kernels.words import PLANES, UNIT, Words, refuses
from profilers.target import Target

FEW = 8
"""Most tokens that `triton-few` takes: each costs it as many multiplications as the first."""

Rows = Literal["few", "many"]


def launch_few(fmt: Format, m: int, n: int, k: int, n_processors: int) -> Launch:
    """Tiles small enough that a program's sums stay in registers; depth counts words of the low plane."""
    rows = next_power(min(m, FEW))
    launch = Launch(rows, cols=16 if rows <= 2 else 8, depth=64, parts=1)
    tokens, outputs = launch.tiles(m, n)
    steps = -(-(k // UNIT * PLANES[fmt.bits][0]) // launch.depth)
    return replace(launch, parts=parts(tokens * outputs, steps, n_processors))


def launch_many(fmt: Format, m: int, n: int, k: int, n_processors: int) -> Launch:
    """Tiles for matrix instructions, of inputs that share a scale.

    What is loaded ahead fits into the 99 KiB that GPUs have from compute capability 8.6, and the sums into their registers.
    """
    depth = UNIT if fmt.group_size(k) % 64 else 64
    return for_matrices(m, n, k, n_processors, depth=depth, stages=2 if PLANES[fmt.bits][1] else 3)


class TritonLinear:
    """A weight in words and how it is multiplied, one call at a time."""

    def __init__(self, words: Words, bias: Tensor | None, dtype: torch.dtype, kernel: TritonGrouped) -> None:
        self.words, self.bias, self.kernel = words, bias, kernel
        self._dtype = dtype
        self._meeting = Meeting()

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        n, k = self.words.shape
        x = x.to(self._dtype).contiguous()
        out = torch.empty((*x.shape[:-1], n), dtype=self._dtype, device=x.device)
        if x.numel():
            self._run(x, out, x.numel() // k)
        return out

    def _run(self, x: Tensor, out: Tensor, m: int) -> None:
        from profilers.kernels import triton_code

        words, fmt = self.words, self.words.format
        n, k = words.shape
        few = self.kernel.rows == "few"
        launch = self.kernel.launch(fmt, m, n, k)
        room, arrived = self._meeting.memory(launch, out, m)
        rounds, by_group = fmt.act_bits == 8, fmt.act_bits == 8 and fmt.act_group != -1
        act_scale = words.scale
        if rounds:
            x, act_scale = quantized(x, fmt.act_group if by_group else k)
        low, high = PLANES[fmt.bits]
        row_step, group_step = words.levels.stride()[:2] if words.levels.dim() == 3 else (0, 0)
        options: dict[str, Any] = {
            "LOW": low, "HIGH": high, "TABLE": words.levels.numel() > 0, "SCALED": words.scale.numel() > 0,
            "OFFSET": not fmt.symmetric, "GROUPED": by_group, "TOKEN": rounds and not by_group, "BIAS": self.bias is not None,
            "SPLIT": launch.parts > 1, "BLOCK_M": launch.rows, "BLOCK_N": launch.cols,
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip
        if few:
            options["BLOCK_W"] = launch.depth
        else:
            # Triton's interpreter multiplies the bits of bf16 as if they were integers.
            floats = "bf16" if x.dtype is torch.bfloat16 and x.is_cuda else "fp32"
            options |= {"BLOCK_K": launch.depth, "DOT": triton_code.OPERANDS["int8" if rounds else floats], "INTEGER": rounds}
        tokens, outputs = launch.tiles(m, n)
        grid = (outputs, tokens, launch.parts) if few else (tokens, outputs, launch.parts)
        (triton_code.few_rows if few else triton_code.many_rows)[grid](
            x, words.low, words.high, words.scale, words.offset, words.levels, act_scale, act_scale,
            words.scale if self.bias is None else self.bias, out, room, arrived,
            m, n, k, fmt.group_size(k), row_step, group_step, **options,
        )  # fmt: skip

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return self.words.decode()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.words.size_bytes()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.words.clone(), self.bias, self._dtype, self.kernel)


@dataclass(frozen=True)
class TritonGrouped:
    """`triton-few` (at most 8 tokens, no matrix instructions) and `triton-many`; both multiply from the same packed weight.

    device, parts: for tests, `cpu` runs Triton's interpreter and `parts` fixes among how many programs inputs are split.
    """

    rows: Rows
    device: Device = "cuda"
    parts: int | None = None

    @property
    def name(self) -> str:
        """`triton-few` or `triton-many`, with `-cpu` behind it where it is interpreted."""
        return f"triton-{self.rows}" + ("" if self.device == "cuda" else "-cpu")

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def launch(self, fmt: Format, m: int, n: int, k: int) -> Launch:
        """How a product of m tokens is divided."""
        found = (launch_few if self.rows == "few" else launch_many)(fmt, m, n, k, processors(self.device))
        return found if self.parts is None else replace(found, parts=self.parts)

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        reason = refuses(fmt, k) or refuses_target(target, self.device, "sm80", "triton")
        if reason is None and self.rows == "few" and m > FEW:
            return f"m={m}: at most {FEW} tokens"
        return reason

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> TritonLinear:
        """See `LinearKernel`."""
        shared = isinstance(like, TritonLinear) and like.kernel.device == self.device
        words = like.words if shared and isinstance(like, TritonLinear) else Words.of(fmt, payload, self.device)
        kept = None if bias is None else bias.detach().float().to(self.device).contiguous()
        return TritonLinear(words, kept, target.dtype, self)


_HASH = hash_of(*SOURCES, __file__)
