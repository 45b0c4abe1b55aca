from __future__ import annotations

from torch import Tensor

from lightning_kd.functional import logit_mse
from lightning_kd.losses.base import DistillationLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class LogitMSE(DistillationLoss):
    """Mean squared difference between the student's and each teacher's logits.

    Args:
        weight: Multiplier of this loss in the total.

    Source:
        Ba & Caruana 2014, https://arxiv.org/abs/1312.6184, equation 1 (mean over classes here).
    """

    takes_unknown_classes = False
    reads_scale = True

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        return teachers.average([logit_mse(student.logits, t.logits) for t in teachers.outputs])
