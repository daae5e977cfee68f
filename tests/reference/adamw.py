"""AdamW in the formulas of arXiv:1711.05101, in fp64; the twin of zangchat/adamw.py."""

from torch import Tensor, zeros_like


class AdamW:
    """One parameter; `step(grad)` updates `weight`."""

    def __init__(
        self, weight: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.weight = weight.double().clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.mean, self.mean_square, self.steps = (
            zeros_like(self.weight),
            zeros_like(self.weight),
            0,
        )

    def step(self, grad: Tensor) -> None:
        grad = grad.double()
        self.steps += 1
        b1, b2 = self.betas
        self.mean = b1 * self.mean + (1 - b1) * grad
        self.mean_square = b2 * self.mean_square + (1 - b2) * grad**2
        mean, mean_square = (
            self.mean / (1 - b1**self.steps),
            self.mean_square / (1 - b2**self.steps),
        )
        self.weight = self.weight * (1 - self.lr * self.weight_decay) - self.lr * mean / (
            mean_square.sqrt() + self.eps
        )
