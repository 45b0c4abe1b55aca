from __future__ import annotations

from typing import Any

from torch import nn

from lightning_kd.distillation import Distillation
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.base import Distiller
from lightning_kd.teachers import SubTeacherEnsemble, SubTeachers
from lightning_kd.weighting import Weighting


class SubTeacher(Distiller):
    """One student learns from labels and from several outputs of one frozen teacher.

    Everything else is as in ``MultiTeacher``: every loss and weighting applies, and a list with one
    entry for each teacher has one for each sub-teacher here.

    Args:
        student: The network to train.
        teacher: One trained network of the same classes; it is never touched.
        source: What makes several out of one: ``StochasticDepth``, ``NoisyTeacher``,
            ``MultiView`` or ``Snapshot`` of ``lightning_kd.teachers``.
        losses: What is transferred, each with its weight: a list, or a mapping of names of your
            own. ``None``: ``SoftTarget`` at temperature 4, weight 0.9.
        weighting: How far each sub-teacher is trusted; ``None``: ``Uniform``.
        task_weight: Multiplier of the task loss; labels of -1 are left out.
        options: Of ``Distiller``: ``task``, ``optimizer``, ``scheduler``, ``scheduler_interval``,
            ``metrics``, ``num_classes``.

    Raises:
        TypeError: If ``source`` is something else.
        ValueError: If student and teacher share weights.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        source: SubTeachers,
        losses: dict[str, DistillationLoss] | list[DistillationLoss] | None = None,
        weighting: Weighting | None = None,
        task_weight: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        teachers = SubTeacherEnsemble(teacher, source)
        self.distillation = Distillation(
            student, teachers, losses, weighting, self.task, task_weight
        )
