from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import probabilistic_distance
from lightning_kd.losses.base import LayerLoss


class PKT(LayerLoss):
    """Probabilistic knowledge transfer: match which samples are close to each other.

    Needs no adapter, whatever the shapes. Works on each rank's own batch.

    Args:
        student_layer: Dotted name of a student layer, usually the last before the classifier.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        weight: Multiplier of this loss in the total; 30000 is usual.

    Source:
        Passalis & Tefas 2018, https://arxiv.org/abs/1803.10837, equations 5 to 9.
    """

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """For the whole batch, a scalar."""
        return probabilistic_distance(student, teacher)
