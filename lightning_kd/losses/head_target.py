from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.functional import kl_divergence
from lightning_kd.losses.base import DistillationLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_positive


class HeadTarget(DistillationLoss):
    r"""Each head of the student learns from a teacher of its own (Hydra).

    .. math:: \sum_m w_m \, \tau^2 KL(p_m^T \| h_m^T)

    The student is a ``MultiBranch`` with one branch per teacher; its heads are kept, and where they
    disagree the student is uncertain (``MultiBranch.branch_logits``).

    Args:
        heads: Number of heads, and of teachers.
        temperature: Softening of student and teachers, > 0.
        weight: Multiplier of this loss in the total.

    Raises:
        ValueError: If a number is not positive, or teachers or the student's heads differ from
            ``heads`` in number.

    Source:
        Tran et al. 2020, https://arxiv.org/abs/2001.04694, section 3.1. First train one head on the
        mean of all teachers (``SoftTarget``), then pass it to ``MultiBranch(alike=True)``.
    """

    def __init__(self, heads: int, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_positive(temperature, "temperature")
        check_positive(heads, "heads")
        self.heads, self.temperature = heads, temperature

    def student_layers(self) -> Sequence[str]:
        """The heads."""
        return [f"branches.{m}" for m in range(self.heads)]

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Check that every teacher has a head."""
        if len(teachers) != self.heads:
            raise ValueError(
                f"Expected a head for each of {len(teachers)} teachers, got heads={self.heads}: "
                f"set it and the student's branches to {len(teachers)}."
            )

    def attach(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """Check that the student has as many heads."""
        branches = getattr(student, "branches", None)
        if isinstance(branches, nn.ModuleList) and len(branches) != self.heads:
            raise ValueError(
                f"Expected a student of {self.heads} branches, got {len(branches)}: set heads."
            )

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        t = self.temperature
        return t**2 * teachers.average(
            [
                kl_divergence(student.feature(f"branches.{m}"), teacher.logits, t, t)
                for m, teacher in zip(teachers.indices, teachers.outputs, strict=True)
            ]
        )
