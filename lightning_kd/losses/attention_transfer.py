from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import attention_distance
from lightning_kd.losses.base import LayerLoss


class AttentionTransfer(LayerLoss):
    """Make the student attend where its teachers do; needs no adapter, whatever the widths.

    Args:
        student_layer: Dotted name of a convolutional student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        weight: Multiplier of this loss in the total; 1000 is usual.

    Source:
        Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, equation 2. Differs from the
        paper: mean of squares as in the authors' code; one instance per stage.
    """

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        return attention_distance(student, teacher)
