from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import decoupled_kl
from lightning_kd.losses.base import DistillationLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_positive


class DecoupledKL(DistillationLoss):
    r"""Decoupled distillation (DKD): the target class and the others are weighted separately.

    .. math:: \tau^2 (\alpha\, TCKD + \beta\, NCKD)

    Several teachers are first averaged into one output.

    Args:
        temperature: Softening of student and teachers, > 0.
        target_weight: Alpha, for "target class against the rest".
        other_weight: Beta, for "the rest among themselves"; 8 in the paper, 1 to 10 are usual.
        weight: Multiplier of this loss in the total.

    Raises:
        ValueError: If the temperature is not positive.

    Source:
        Zhao et al. 2022, https://arxiv.org/abs/2203.08679, equation 7. Differs from the paper:
        where a sample has no label, the teachers' most likely class is used; the paper ramps the
        weight up over 20 epochs, which ``LossWeightScheduler`` can do.
    """

    fewest_classes = 2  # the target class and another

    def __init__(
        self,
        temperature: float = 4.0,
        target_weight: float = 1.0,
        other_weight: float = 8.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_positive(temperature, "temperature")
        self.temperature = temperature
        self.target_weight, self.other_weight = target_weight, other_weight

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        # log-probabilities at temperature T, times T, are logits that yield them again at T
        ensemble = teachers.log_probabilities(self.temperature) * self.temperature
        if target is None:
            target = ensemble.argmax(1)
        values = decoupled_kl(
            student.logits,
            ensemble,
            target,
            self.temperature,
            self.target_weight,
            self.other_weight,
        )
        return values.mean() * self.temperature**2
