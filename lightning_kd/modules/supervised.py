from __future__ import annotations

from typing import Any

from torch import nn

from lightning_kd.distillation import Distillation
from lightning_kd.modules.base import Distiller
from lightning_kd.teachers import StochasticDepth


class Supervised(Distiller):
    """One network learns from labels alone: trains a teacher, or the baseline of a student.

    Args:
        student: The network to train.
        stochastic_depth: Leave out blocks at random while training, so that the network can be a
            teacher of ``SubTeacher`` by the same part; one path a batch, whatever its ``count``.
        options: Of ``Distiller``: ``task``, ``optimizer``, ``scheduler``, ``scheduler_interval``,
            ``metrics``, ``num_classes``.
    """

    def __init__(
        self, student: nn.Module, stochastic_depth: StochasticDepth | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.distillation = Distillation(
            student, task=self.task, task_weight=1.0, stochastic_depth=stochastic_depth
        )
