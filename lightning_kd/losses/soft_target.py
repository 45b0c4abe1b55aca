from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import kl_divergence
from lightning_kd.losses.base import DistillationLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_positive


class SoftTarget(DistillationLoss):
    r"""KL divergence from the teachers' softened mean output to the student's (Hinton).

    .. math:: \tau^2 \sum_k p_k^T (\log p_k^T - \log p_k^S)

    Summed over classes, averaged over samples.

    Args:
        temperature: Softening of student and teachers, > 0.
        student_temperature: Softening of the student alone; ``None``: ``temperature``.
        teacher_temperature: Softening of the teachers alone; ``None``: ``temperature``.
        temperature_squared: Multiply by the student's temperature squared, so that the gradient's
            size does not depend on it.
        weight: Multiplier of this loss in the total.

    Raises:
        ValueError: If a temperature is not positive.

    Source:
        Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2. Differs from the paper:
        separate temperatures are possible (Rusu et al. 2016: 0.01 and 1 without the square).
    """

    def __init__(
        self,
        temperature: float = 4.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        temperature_squared: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        for name, value in (
            ("temperature", temperature),
            ("student_temperature", student_temperature),
            ("teacher_temperature", teacher_temperature),
        ):
            if value is not None:
                check_positive(value, name)
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.temperature_squared = temperature_squared

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        hot = self.temperature if self.student_temperature is None else self.student_temperature
        cold = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        ensemble = teachers.log_probabilities(cold)
        divergence = kl_divergence(student.logits, ensemble, student_temperature=hot).mean()
        return divergence * hot**2 if self.temperature_squared else divergence
