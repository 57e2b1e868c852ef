"""Orthogonal matrices that spread outliers: Hadamard matrices, with random signs, and random rotations. All in fp64, all orthonormal.

A Hadamard matrix H_n has entries of one size and H H^T = n I. Here are those of order 2^k, and m * 2^k with Paley's m: 12, 20, 28, 36,
60, …, so that 576 = 36 * 16, 896 = 28 * 32, 1536 = 12 * 128, 3584 = 28 * 128 have one and 11008 = 2^8 * 43 has not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard_factors(n: int) -> tuple[int, int] | None:
    """(m, 2**k) with m * 2**k = n and a Hadamard matrix of order m, m as small as possible; None where none is known here."""
    power = n & -n
    while power >= 1:
        if n // power == 1 or _paley_prime(n // power) is not None:
            return n // power, power
        power //= 2
    return None


def hadamard(n: int) -> Tensor:
    """H / sqrt(n), (n, n) orthogonal; raises ValueError for an order of which no matrix is known here."""
    factors = hadamard_factors(n)
    if factors is None:
        raise ValueError(f"hadamard: no matrix of order {n} is known here; use blocks of {n & -n}, which divides it")
    m, power = factors
    return torch.kron(_paley(m), _sylvester(power)) / math.sqrt(n)


def block_transform(x: Tensor, block: int, *, inverse: bool = False) -> Tensor:
    """x (..., n) -> every `block` neighbours times `hadamard(block)`: `x @ (I ⊗ H)^T`, or `x @ (I ⊗ H)` to undo it, in x's dtype.

    Fast: O(n (m + log2 2^k)) for block = m * 2^k. Raises ValueError where the block does not divide n or has no matrix.
    """
    n, factors = x.shape[-1], hadamard_factors(block)
    if factors is None or n % block:
        raise ValueError(f"hadamard: blocks of {block} in {n} channels; use a power of two that divides {n & -n}")
    m, power = factors
    x = x.reshape(*x.shape[:-1], n // block, m, power)
    if m > 1:
        matrix = _paley(m).to(x.dtype)
        x = torch.einsum("...jk,ij->...ik", x, matrix.T if inverse else matrix)
    x = _butterflies(x)
    return x.reshape(*x.shape[:-3], n) / math.sqrt(block)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """(n,) of 1 and -1."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """(n, n) orthogonal: random signs, then a Hadamard matrix (QuaRot, section 3.1).

    Where none is known of order n, a random rotation of n's odd part takes the place of the Paley factor: every channel is still mixed
    with every other one.
    """
    signs = random_signs(n, generator)
    if hadamard_factors(n) is not None:
        return signs[:, None] * hadamard(n)
    power = n & -n
    odd = random_orthogonal(n // power, generator)
    return signs[:, None] * torch.kron(odd, _sylvester(power) / math.sqrt(power))


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """(n, n) orthogonal, uniform: the QR of a Gaussian matrix with the signs that make it unique (Mezzadri 2007, section 5)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).double()
    result: Tensor = (q * signs).contiguous()
    return result


def _butterflies(x: Tensor) -> Tensor:
    """The last dimension, a power of two, times Sylvester's matrix, which is symmetric."""
    n, half = x.shape[-1], 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).reshape(x.shape)
        half *= 2
    return x


def _sylvester(n: int) -> Tensor:
    """Signs (n, n) of the Hadamard matrix of a power of two."""
    return _butterflies(torch.eye(n, dtype=torch.float64))


def _paley_prime(n: int) -> int | None:
    """The prime from which Paley's construction makes a matrix of order n: n - 1 (I) or n / 2 - 1 (II)."""
    if n % 4 == 0 and _is_prime(n - 1) and n - 1 > 2:
        return n - 1
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return n // 2 - 1
    return None


def _paley(n: int) -> Tensor:
    """Signs (n, n) of Paley's Hadamard matrix (1933); (1, 1) for n = 1.

    With Q the Jacobsthal matrix of a prime q and S = [[0, 1], [+-1, Q]]: I + S for q = 3 mod 4; for q = 1 mod 4 every
    zero of S becomes [[1, -1], [-1, -1]] and every sign s becomes s * [[1, 1], [1, -1]].
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley_prime(n)
    assert q is not None, "hadamard_factors() has found it"
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    s = torch.ones(q + 1, q + 1, dtype=torch.float64)
    s[0, 0] = 0.0
    s[1:, 1:] = character[(index[:, None] - index) % q]
    if q % 4 == 3:
        s[1:, 0] = -1.0
        return torch.eye(n, dtype=torch.float64) + s
    small = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(s, small) + torch.kron(torch.eye(q + 1, dtype=torch.float64), zero)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
