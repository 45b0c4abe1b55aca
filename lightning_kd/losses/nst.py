from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import selectivity_distance
from lightning_kd.losses.base import LayerLoss


class NST(LayerLoss):
    """Neuron selectivity transfer: match the distribution of channel activations.

    Squared maximum mean discrepancy between the two sets of channels; needs no adapter.

    Args:
        student_layer: Dotted name of a convolutional student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        weight: Multiplier of this loss in the total; 50 is usual.

    Source:
        Huang & Wang 2017, https://arxiv.org/abs/1707.01219, equation 7, polynomial kernel.
    """

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        return selectivity_distance(student, teacher)
