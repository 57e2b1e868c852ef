"""Gradient descent on orthogonal matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LARGEST_TURN = 1.0
"""Bound on the step times the norm of its direction, so that one step never turns by more than about a radian."""


class CayleySGD(torch.optim.Optimizer):
    """SGD with momentum for parameters (…, n, n) that are orthogonal, which they stay to fp64 rounding.

    Li, Li & Todorovic (2020), Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform, algorithm 1.
    Deviation: the Cayley transform is solved exactly, not iterated, since the matrices are small.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float = 1.5, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._turn(parameter, group["lr"], group["momentum"])

    def _turn(self, x: Tensor, rate: float, momentum: float) -> None:
        state = self.state[x]
        m = momentum * state.get("momentum", torch.zeros_like(x)) - x.grad
        skew = m @ x.mT - 0.5 * x @ (x.mT @ m @ x.mT)  # line 6
        skew = skew - skew.mT
        state["momentum"] = skew @ x  # line 7: the momentum, projected to the tangent space
        norm = torch.linalg.matrix_norm(skew, keepdim=True)
        alpha = torch.clamp(_LARGEST_TURN / norm.clamp_min(1e-12), max=rate)  # line 8
        x.copy_(cayley(alpha * skew) @ x)


def cayley(skew: Tensor) -> Tensor:
    """The rotation (I - A/2)^-1 (I + A/2) of a skew-symmetric A (…, n, n)."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    rotation: Tensor = torch.linalg.solve(eye - skew / 2, eye + skew / 2)
    return rotation
