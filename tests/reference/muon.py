"""Muon for one matrix at a time; the twin of zangchat/muon.py.

It also derives the Polar Express coefficients.
"""

import math

import numpy as np
import torch
from torch import Tensor


def _best_quintic(low: float, high: float) -> np.ndarray:
    """(a, b, c) of the odd quintic closest to 1 on [low, high] in the maximum norm, by the Remez
    exchange.

    At the optimum the error takes the values +E, -E, +E, -E at low, at two inner extrema and at
    high.
    """
    inner, error = np.array([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high]), math.inf
    while True:
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        # a + 3b x^2 + 5c x^4 = 0
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
        if abs(new_error - error) < 1e-15:
            return np.array([a, b, c])
        error = new_error


def polar_express_coefficients(
    steps: int = 5, low: float = 1e-3, safety: float = 1.02, cushion: float = 0.02
) -> list[np.ndarray]:
    """The greedily optimal composition (arXiv:2505.16932, theorem 3.1) with its two concessions to
    finite precision.

    `cushion`: intervals are treated as at least [cushion * high, high], then recentred on 1.
    `safety`: all polynomials but the last are evaluated at x / safety.
    """
    high, coefficients = 1.0, []
    powers = np.array([1, 3, 5])
    for step in range(steps):
        polynomial = _best_quintic(max(low, cushion * high), high)
        polynomial = polynomial * 2 / (polynomial @ low**powers + polynomial @ high**powers)
        if step < steps - 1:
            polynomial = polynomial / safety**powers
        coefficients.append(polynomial)
        low = float(polynomial @ low**powers)
        high = 2 - low
    return coefficients


def orthogonalise(matrix: Tensor, coefficients: list[np.ndarray]) -> Tensor:
    """The composed polynomial applied to the singular values, by an SVD in fp64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.norm() * 1.02 + 1e-6)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


class Muon:
    """One matrix; `step(grad)` updates `weight` in fp64."""

    def __init__(
        self, weight: Tensor, lr: float, momentum: float, weight_decay: float, beta2: float
    ) -> None:
        self.weight = weight.double().clone()
        self.settings = (lr, momentum, weight_decay, beta2)
        self.momentum = torch.zeros_like(self.weight)
        self.second: Tensor | None = None
        self.coefficients = polar_express_coefficients()

    def step(self, grad: Tensor) -> None:
        lr, momentum, weight_decay, beta2 = self.settings
        rows, columns = self.weight.shape
        self.momentum = momentum * self.momentum + (1 - momentum) * grad
        update = orthogonalise((1 - momentum) * grad + momentum * self.momentum, self.coefficients)

        squares = (update**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
        previous = torch.zeros_like(squares) if self.second is None else self.second
        self.second = beta2 * previous + (1 - beta2) * squares
        scaled = update / self.second.sqrt()
        scaled = scaled * update.norm() / scaled.norm()

        lr = lr * math.sqrt(max(1.0, rows / columns))
        agrees = (scaled * self.weight >= 0).double()
        self.weight = self.weight - lr * scaled - lr * weight_decay * agrees * self.weight
