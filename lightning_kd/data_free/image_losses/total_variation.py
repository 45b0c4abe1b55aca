from __future__ import annotations

from torch import Tensor

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.functional import total_variation


class TotalVariation(ImageLoss):
    """Smooth images.

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, equation 3.
    """

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        return total_variation(inputs.images)
