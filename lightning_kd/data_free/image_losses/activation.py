from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs


class Activation(ImageLoss):
    """Images to which a layer of the teacher responds strongly.

    Args:
        layer: Dotted name of a layer of the teacher, usually the last before the classifier.
        weight: Multiplier of this loss in the total.

    Source:
        Chen et al. 2019 (DAFL), https://arxiv.org/abs/1904.01186, equation 5.
    """

    def __init__(self, layer: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.layer = layer

    def teacher_layers(self) -> Sequence[str]:
        """The layer."""
        return (self.layer,)

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        return -inputs.teacher.feature(self.layer).float().abs().mean()
