from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.functional import jensen_shannon_of_logits, kl_divergence, logit_l1
from lightning_kd.utils.checks import check_one_of


class Adversarial(ImageLoss):
    """Images on which the student differs from its teacher; the distance is maximised.

    Args:
        weight: Multiplier of this loss in the total.
        distance: ``"kl"``, ``"l1"`` (of logits, DFAD) or ``"js"`` (DeepInversion).
        masked: Count only images on which both predict the same class (CMI, Fast-Datafree).
        temperature: Softening of both, > 0; not for ``"l1"``.

    Raises:
        ValueError: If ``distance`` is none of these or ``temperature`` is not positive.

    Source:
        Micaelli & Storkey 2019 (ZSKT), https://arxiv.org/abs/1905.09768; DFAD,
        https://arxiv.org/abs/1912.11006, equation 4; mask: CMI, https://arxiv.org/abs/2105.08584.
    """

    reads_student = True
    waits = True

    def __init__(
        self,
        weight: float = 1.0,
        distance: Literal["kl", "l1", "js"] = "kl",
        masked: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_one_of(distance, ("kl", "l1", "js"), "distance")
        if temperature <= 0:
            raise ValueError(f"Expected temperature > 0, got {temperature}.")
        self.distance, self.masked, self.temperature = distance, masked, temperature

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        assert inputs.student is not None
        student, teacher, t = inputs.student.logits, inputs.teacher.logits, self.temperature
        if self.distance == "kl":
            distances = kl_divergence(student, teacher, t, t)
        elif self.distance == "l1":
            distances = logit_l1(student, teacher)
        else:
            distances = jensen_shannon_of_logits(student, teacher, t)
        if self.masked:
            distances = distances * (student.argmax(1) == teacher.argmax(1))
        return -distances.mean()
