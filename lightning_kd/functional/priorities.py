"""Prioritized replay: probabilities and importance weights."""

from __future__ import annotations

from torch import Tensor

from lightning_kd.utils.checks import check_one_of


def priority_probabilities(priorities: Tensor, alpha: float, epsilon: float = 1e-6) -> Tensor:
    r"""Probability of drawing each image, :math:`P_i \propto (|\delta_i| + \epsilon)^\alpha`.

    Args:
        priorities: Shape (N,).
        alpha: Exponent; 0 draws uniformly.
        epsilon: Keeps images of priority 0 in play, > 0.

    Returns:
        Shape (N,), summing to 1.

    Source:
        Schaul et al. 2016, https://arxiv.org/abs/1511.05952, equation 1; SSD-KD, equation 6.
    """
    scaled = (priorities.abs() + epsilon) ** alpha
    return scaled / scaled.sum()


def importance_weights(
    probabilities: Tensor, count: int, beta: float, normalize: str = "mean"
) -> Tensor:
    r"""Weights that undo part of the bias of drawing by priority, :math:`w_i = (N P_i)^{-\beta}`.

    Args:
        probabilities: Probabilities of the drawn images, shape (B,).
        count: Number N of images to draw from.
        beta: Exponent; 0: no correction; 1: the expected gradient is that of uniform draws.
        normalize: ``"mean"``: mean 1 in the batch; ``"max"``: largest 1 (which lowers the learning
            rate); ``"none"``: as in the paper.

    Returns:
        Weights, shape (B,).

    Source:
        Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.4; SSD-KD, equation 5.
    """
    check_one_of(normalize, ("mean", "max", "none"), "normalize")
    weights = (count * probabilities) ** -beta
    if normalize == "mean":
        return weights / weights.mean()
    return weights / weights.max() if normalize == "max" else weights
