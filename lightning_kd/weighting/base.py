from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge


class Weighting(nn.Module, ABC):
    """How far each teacher is trusted, and where their answers are averaged.

    Args:
        space: ``"probability"`` (arithmetic mean of softened answers) or ``"logit"`` (mean of
            logits, which needs teachers of comparable logit scale).

    Raises:
        ValueError: If ``space`` is neither.
    """

    def __init__(self, space: str = "probability") -> None:
        super().__init__()
        if space not in ("probability", "logit"):
            raise ValueError(f'Expected space to be "probability" or "logit", got {space!r}.')
        self.space = space

    def active(self, num_teachers: int) -> Sequence[int]:
        """Teachers to run on this batch; asked before they run, so the others cost nothing."""
        return range(num_teachers)

    @abstractmethod
    def forward(
        self, teachers: Sequence[Knowledge], student: Knowledge | None, target: Tensor | None
    ) -> Tensor:
        """Trust in each teacher that ran.

        Args:
            teachers: Knowledge of the active teachers.
            student: The student's, or None where it was not asked yet.
            target: Labels (B, ...), -1 where unlabelled, or None.

        Returns:
            Weights, shape (M,) or (M, B), summing to 1 over M.
        """
