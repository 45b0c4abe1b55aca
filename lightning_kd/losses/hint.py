from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.features import Projection
from lightning_kd.functional import hint_distance
from lightning_kd.losses.base import LayerLoss
from lightning_kd.outputs import NetworkOutput


class Hint(LayerLoss):
    """Match a student layer to a teacher layer, through one learned projection per teacher.

    Projections are sized by a dry run, trained with the student, and not exported.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        power: 1 (absolute) or 2 (squared) difference.
        adapter: Use projections; without them both layers must have the same shape.
        weight: Multiplier of this loss in the total; 100 is usual for squared differences.

    Source:
        Romero et al. (FitNets), https://arxiv.org/abs/1412.6550, equation 3. Differs from the
        paper: one stage, trained jointly with the other losses, as in RepDistiller.
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        power: int = 2,
        adapter: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if power not in (1, 2):
            raise ValueError(f"Expected power 1 or 2, got {power}.")
        self.power = power
        self.adapter = adapter
        self.projections = nn.ModuleList()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make one projection for each teacher."""
        if self.adapter and not self.projections:
            shape = student.feature(self.student_layer).shape
            self.projections.extend(
                Projection(shape, self.teacher_feature(m, teacher).shape)
                for m, teacher in enumerate(teachers)
            )

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        adapted = self.projections[index](student) if self.adapter else student
        return hint_distance(adapted, teacher, self.power)
