from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import attention_distance
from lightning_kd.losses.base import LayerLoss


class AttentionTransfer(LayerLoss):
    """Let the student look where its teachers look; needs no adapter, whatever the widths.

    Args:
        student_layer: Dotted name of a convolutional student layer.
        teacher_layer: Dotted name of a teacher layer; a list gives one name for each teacher.
        weight: Multiplier of this term in the total loss; 1000 is usual.

    Source:
        Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, equation 2. Differs from the
        paper: mean of squares as in the authors' code; one instance a stage.
    """

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        return attention_distance(student, teacher)
