from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_kd.functional import importance_weights, priority_probabilities, widest
from lightning_kd.utils.checks import check_one_of


class Sampler(ABC):
    """Chooses the remembered images that a student sees next, without waiting for the device."""

    #: whether divergences are to be written back as priorities
    prioritizes = False

    @abstractmethod
    def __call__(
        self, priorities: Tensor, count: int, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw ``count`` indices, with replacement.

        Args:
            priorities: Of all images, shape (N,).
            count: How many to draw.
            random: Generator on the device of ``priorities``.

        Returns:
            Indices and weights in the loss, each of shape (count,).
        """


class Uniform(Sampler):
    """Every image with the same probability."""

    def __call__(
        self, priorities: Tensor, count: int, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See ``Sampler``."""
        device = priorities.device
        indices = torch.randint(len(priorities), (count,), generator=random, device=device)
        return indices, torch.ones(count, device=device)


class Prioritized(Sampler):
    r"""Images on which the student is far from its teacher are drawn more often.

    Drawn images get the priority :math:`w \cdot KL`, so that in equilibrium they are drawn in
    proportion to :math:`KL^{\alpha / (1 + \alpha \beta)}`.

    Args:
        alpha: How much priority counts, >= 0; 0 draws uniformly.
        beta: How much of the bias the weights undo, in [0, 1]; at 1 nothing is emphasised.
        epsilon: Added to every priority, > 0.
        normalize: Of the weights: ``"mean"``, ``"max"`` or ``"none"``; see
            ``functional.importance_weights``.

    Raises:
        ValueError: If a number is out of range, or alpha * beta >= 1: priorities never settle.

    Source:
        Schaul et al. 2016, https://arxiv.org/abs/1511.05952; SSD-KD, equations 4 to 6. The paper
        gives no constants: these did best in trials.
    """

    prioritizes = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.4,
        epsilon: float = 1e-6,
        normalize: str = "mean",
    ) -> None:
        if alpha < 0 or not 0 <= beta <= 1 or epsilon <= 0:
            raise ValueError(
                f"Expected alpha >= 0, beta from 0 to 1 and epsilon > 0, got {alpha}, {beta} and "
                f"{epsilon}."
            )
        if alpha * beta >= 1:
            raise ValueError(
                f"Expected alpha * beta < 1, where priorities settle, got {alpha} * {beta}."
            )
        check_one_of(normalize, ("mean", "max", "none"), "normalize")
        self.alpha, self.beta, self.epsilon, self.normalize = alpha, beta, epsilon, normalize

    def __call__(
        self, priorities: Tensor, count: int, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See ``Sampler``."""
        chances = priority_probabilities(widest(priorities), self.alpha, self.epsilon)
        points = torch.rand(count, generator=random, device=chances.device, dtype=chances.dtype)
        # rounding may leave the last sum below 1
        indices = torch.searchsorted(chances.cumsum(0), points, right=True)
        indices = indices.clamp(max=len(chances) - 1)
        weights = importance_weights(chances[indices], len(chances), self.beta, self.normalize)
        return indices, weights.to(priorities.dtype)
