from __future__ import annotations

from torch import Tensor

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.functional import class_balance


class ClassBalance(ImageLoss):
    """Batches in which the teacher predicts all classes equally often.

    Source:
        Chen et al. 2019 (DAFL), https://arxiv.org/abs/1904.01186, equation 6. Differs from the
        authors' code: natural logarithm.
    """

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        return class_balance(inputs.teacher.logits)
