from __future__ import annotations

import dataclasses

from torch import Tensor

from lightning_kd.functional import standardize
from lightning_kd.losses.soft_target import SoftTarget
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class LogitStandardization(SoftTarget):
    """Soft targets from z-scored logits: the student matches relations, not the teachers' scale.

    Each teacher's logits are standardised before they are averaged, which also makes teachers of
    different logit scale comparable.

    Args:
        temperature: Softening of student and teachers, in standard deviations, > 0.
        temperature_squared: Multiply by the temperature squared.
        weight: Multiplier of this loss in the total; 9 is usual.

    Raises:
        ValueError: If the temperature is not positive.

    Source:
        Sun et al. 2024, https://arxiv.org/abs/2403.01427, algorithm 1.
    """

    takes_unknown_classes = False

    def __init__(
        self, temperature: float = 2.0, temperature_squared: bool = True, weight: float = 9.0
    ) -> None:
        super().__init__(temperature, temperature_squared=temperature_squared, weight=weight)

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        outputs = [NetworkOutput(standardize(output.logits)) for output in teachers.outputs]
        return super().forward(
            NetworkOutput(standardize(student.logits)),
            dataclasses.replace(teachers, outputs=outputs),
            target,
        )
