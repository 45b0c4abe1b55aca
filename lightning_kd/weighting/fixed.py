from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Space, Weighting


def check_given_weights(weights: Sequence[float]) -> None:
    """Raise ``ValueError`` unless all are >= 0 and finite, and one is positive."""
    if not weights or min(weights) < 0 or not 0 < math.fsum(weights) < math.inf:
        raise ValueError(
            f"Expected weights >= 0, one for each teacher and not all 0, got {list(weights)}."
        )


class Fixed(Weighting):
    """Weights given by the user; a teacher with weight 0 is never run.

    Args:
        weights: One number >= 0 for each teacher; scaled to sum to 1.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Raises:
        ValueError: If a weight is negative or not finite, or none is positive.
    """

    weights: Tensor
    varies = False
    reads_logits = False

    def __init__(self, weights: list[float], space: Space = "probability") -> None:
        super().__init__(space)
        check_given_weights(weights)
        self.given = list(weights)
        positive = torch.tensor([w for w in weights if w > 0], dtype=torch.float64)
        self.register_buffer("weights", (positive / positive.sum()).float(), persistent=False)

    def active(self, num_teachers: int) -> Sequence[int]:
        """Teachers of positive weight.

        Raises:
            ValueError: If there is not one weight per teacher.
        """
        if num_teachers != len(self.given):
            raise ValueError(
                f"Expected one weight for each of {num_teachers} teachers, got {len(self.given)}: "
                f"{self.given}."
            )
        return [m for m, weight in enumerate(self.given) if weight > 0]

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """The given weights of the active teachers, shape (M,)."""
        return self.weights
