from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.features import Projection
from lightning_kd.functional import unit_distance
from lightning_kd.losses.base import LayerLoss
from lightning_kd.outputs import NetworkOutput


class FEED(LayerLoss):
    r"""Feature-level ensemble: match each teacher's map through a non-linear transform of its own.

    .. math:: \sum_m w_m \Big\| \frac{x_m}{\|x_m\|_2} - \frac{r_m(x_S)}{\|r_m(x_S)\|_2} \Big\|_1

    Args:
        student_layer: Dotted name of a convolutional student layer, usually of the last stage.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        depth: Number of 3x3 convolutions in each transform.
        weight: Multiplier of this loss in the total.

    Source:
        Park & Kwak 2019, https://arxiv.org/abs/1909.10754, equation 2. Differs from the paper:
        weighted mean over the teachers instead of their sum; maps of other sizes are resized.
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        depth: int = 3,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if depth < 1:
            raise ValueError(f"Expected depth >= 1, got {depth}.")
        self.depth = depth
        self.transforms = nn.ModuleList()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make one transform for each teacher."""
        if not self.transforms:
            shape = self.student_feature(student).shape
            self.transforms.extend(
                Projection(shape, self.teacher_feature(m, teacher).shape, self.depth)
                for m, teacher in enumerate(teachers)
            )

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        return unit_distance(self.transforms[index](student), teacher)
