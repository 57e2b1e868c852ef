"""2:4 sparse bf16 products by torch's cuSPARSELt, with the algorithm searched for the shape. Not run on a device yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from methods.formats.format import Format
from profilers.kernels.device import refuses_target
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.target import Target

_TOKENS = 8


class Sparse24Linear:
    """A compressed weight of shape (n, k): its kept elements, then their places. Tokens are padded to a multiple of eight."""

    def __init__(self, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        self.packed, self.shape, self.bias = packed, shape, bias
        self._algorithms: dict[int, int] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        rows = x.to(torch.bfloat16).reshape(-1, self.shape[1])
        m = len(rows)
        inputs = functional.pad(rows, (0, 0, 0, -m % _TOKENS)).contiguous().t()
        y = torch._cslt_sparse_mm(self.packed, inputs, bias=self.bias, transpose_result=True, alg_id=self._algorithm(inputs))
        return y[:m].reshape(*x.shape[:-1], self.shape[0])

    def _algorithm(self, inputs: Tensor) -> int:
        m = inputs.shape[1]
        if m not in self._algorithms:
            self._algorithms[m] = int(torch._cslt_sparse_mm_search(self.packed, inputs, bias=self.bias, transpose_result=True))
        return self._algorithms[m]

    def dequant(self) -> Tensor:
        """See `Prepared`. The layout has no inverse: weights come back by multiplying unit columns, exactly."""
        eye = torch.eye(self.shape[1], dtype=torch.bfloat16, device=self.packed.device)
        return torch._cslt_sparse_mm(self.packed, eye).float().cpu()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.packed.numel() * self.packed.element_size()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.packed.clone(), self.shape, self.bias)


@dataclass(frozen=True)
class Sparse24:
    """`sparse24`: bf16 weights of which two of every four along the inputs are zero."""

    name: str = "sparse24"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if (fmt.dense, fmt.zeros, fmt.every) != ("bf16", 50, 4) or target.compute_dtype != "bf16":
            return "bf16-2of4 only, computed in bf16"
        if n % 16 or k % 16:
            return f"n={n} and k={k} must be multiples of 16"
        if target.present and target.device == "cuda" and not torch.backends.cusparselt.is_available():
            return "this torch was built without cuSPARSELt"
        return refuses_target(target, "cuda", "sm80")

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Sparse24Linear:
        """See `LinearKernel`; raises ValueError where more than two of four weights are not zero."""
        weight = payload["weight"]
        if not is_24(weight):
            raise ValueError("sparse24: more than two of four neighbouring weights of a row are not zero; prune them first")
        packed = torch._cslt_compress(weight.detach().to(target.device, torch.bfloat16).contiguous())
        kept = None if bias is None else bias.detach().bfloat16().to(target.device)
        return Sparse24Linear(packed, (weight.shape[0], weight.shape[1]), kept)


def is_24(weight: Tensor) -> bool:
    """Whether at most two of every four neighbouring weights of a row are not zero; weight: (n, k), k a multiple of four."""
    return bool(((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all())


_HASH = hash_of(__file__)
