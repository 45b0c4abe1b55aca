from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Space, Weighting
from lightning_kd.weighting.fixed import check_given_weights


class Switching(Weighting):
    """One teacher for each batch, drawn at random; the others are not run.

    In expectation the gradient is that of the average, at the cost of one teacher. All ranks draw
    the same teacher, and a resumed run continues the same sequence. When the ensemble is
    evaluated, every teacher is weighted by its probability.

    Args:
        probabilities: One number >= 0 for each teacher, scaled to sum to 1; ``None``: all equal.
        seed: Seed of the sequence of teachers.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Raises:
        ValueError: If a probability is negative or not finite, or none is positive.

    Source:
        Fukuda et al. 2017, "Efficient Knowledge Distillation from an Ensemble of Teachers",
        Interspeech, section 3.1.
    """

    reads_logits = False

    def __init__(
        self,
        probabilities: list[float] | None = None,
        seed: int = 0,
        space: Space = "probability",
    ) -> None:
        super().__init__(space)
        if probabilities is not None:
            check_given_weights(probabilities)
        self.probabilities, self.seed = probabilities, seed
        self.draws = 0

    def active(self, num_teachers: int) -> Sequence[int]:
        """The drawn teacher; all of them when the ensemble is evaluated.

        Raises:
            ValueError: If there is not one probability per teacher.
        """
        given = self.probabilities or [1.0] * num_teachers
        if len(given) != num_teachers:
            raise ValueError(
                f"Expected one probability for each of {num_teachers} teachers, got {len(given)}."
            )
        if not self.training:
            return range(num_teachers)
        draw = random.Random(f"{self.seed}-{self.draws}")  # its own random state: ranks agree
        self.draws += 1
        return draw.choices(range(num_teachers), given)

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """1 for the drawn teacher, shape (1,); else the probabilities, shape (M,)."""
        count = len(teachers)
        given = self.probabilities if self.probabilities and count > 1 else [1.0] * count
        weights = torch.tensor(given, device=teachers[0].logits.device)
        return weights / weights.sum()

    def get_extra_state(self) -> dict[str, Any]:
        """Number of draws so far, for the checkpoint."""
        return {"draws": self.draws}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of draws."""
        self.draws = state["draws"]
