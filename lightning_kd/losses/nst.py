from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import selectivity_distance
from lightning_kd.losses.base import LayerLoss


class NST(LayerLoss):
    """Neuron selectivity transfer: what the student's channels react to is distributed alike.

    Squared maximum mean discrepancy between the two sets of channels; needs no adapter.

    Args:
        student_layer: Dotted name of a convolutional student layer.
        teacher_layer: Dotted name of a teacher layer; a list gives one name for each teacher.
        weight: Multiplier of this term in the total loss; 50 is usual.

    Source:
        Huang & Wang 2017, https://arxiv.org/abs/1707.01219, equation 7, polynomial kernel.
    """

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        return selectivity_distance(student, teacher)
