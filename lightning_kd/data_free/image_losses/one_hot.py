from __future__ import annotations

from torch import Tensor

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.functional import modulating_weights, soft_cross_entropy


class OneHot(ImageLoss):
    r"""Images for which the teacher predicts the target.

    .. math:: \frac{1}{B} \sum_x \phi(x) \, CE(z_T(x) / \tau, y)

    Args:
        weight: Multiplier of this loss in the total.
        modulate: Weight images by SSD-KD's modulating function: rare classes and images that the
            teacher finds hard count more. Else all count the same.
        gamma: Strength of the difficulty in it, >= 0.
        detach: No gradient through the modulating function.
        normalize: Divide it by its mean in the batch.
        diversity_norm: Multiply its first factor by K / (K - 1), so that it is 1 if the memory
            holds all classes equally often.
        temperature: Softening of the teacher, > 0.

    Raises:
        ValueError: If a number is out of range.

    Source:
        SSD-KD, equations 2 and 3; without modulation DAFL, equation 4.
    """

    def __init__(
        self,
        weight: float = 1.0,
        modulate: bool = False,
        gamma: float = 1.0,
        detach: bool = True,
        normalize: bool = False,
        diversity_norm: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if gamma < 0 or temperature <= 0:
            raise ValueError(
                f"Expected gamma >= 0 and temperature > 0, got {gamma} and {temperature}."
            )
        self.modulate, self.gamma, self.detach = modulate, gamma, detach
        self.normalize, self.diversity_norm = normalize, diversity_norm
        self.temperature = temperature
        self.phi: Tensor | None = None

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        logits = inputs.teacher.logits
        losses = soft_cross_entropy(logits, inputs.target, self.temperature)
        if not self.modulate:
            return losses.mean()
        share = inputs.class_share
        if share is None:
            share = logits.new_zeros(logits.shape[1])
        phi = modulating_weights(
            logits.detach() if self.detach else logits, share, self.gamma, self.diversity_norm
        )
        self.phi = phi.detach()
        if self.normalize:
            phi = phi / phi.mean().clamp(min=1e-6)
        return (phi * losses).mean()
