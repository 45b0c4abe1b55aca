from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import relational_angle, relational_distance
from lightning_kd.losses.base import LayerLoss


class Relational(LayerLoss):
    r"""Relational distillation (RKD): distances and angles between the samples of a batch.

    .. math:: \lambda_d\, L_{distance} + \lambda_a\, L_{angle}

    Needs no adapter, whatever the shapes. Works on each rank's own batch.

    Args:
        student_layer: Dotted name of a student layer, usually the last before the classifier.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        distance_weight: Multiplier of the distances.
        angle_weight: Multiplier of the angles; memory grows with the batch size cubed; 0: skipped.
        weight: Multiplier of this loss in the total.

    Source:
        Park et al. 2019, https://arxiv.org/abs/1904.05068, equations 5 to 9; weights 25 and 50.
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """For the whole batch, a scalar."""
        loss = self.distance_weight * relational_distance(student, teacher)
        if self.angle_weight:
            loss = loss + self.angle_weight * relational_angle(student, teacher)
        return loss
