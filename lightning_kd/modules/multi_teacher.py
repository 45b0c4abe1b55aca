from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.distillation import Distillation
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.base import Distiller
from lightning_kd.modules.fill_cache import fill_cache
from lightning_kd.teachers import TeacherCache
from lightning_kd.weighting import Weighting


class MultiTeacher(Distiller):
    r"""One student learns from labels and from one or more frozen teachers.

    .. math:: w_{task} CE(z^S, y) + \sum_i w_i L_i(student, teachers)

    With one teacher and the default loss it is Hinton's distillation.

    Args:
        student: The network to train.
        teachers: One or more trained networks of the same classes; they are never touched.
        losses: What is transferred, each with its weight: a list, or a mapping of names of your
            own. ``None``: ``SoftTarget`` at temperature 4, weight 0.9.
        weighting: How far each teacher is trusted; ``None``: ``Uniform``.
        task_weight: Multiplier of the task loss; labels of -1 are left out.
        options: Of ``Distiller``: ``task``, ``optimizer``, ``scheduler``, ``scheduler_interval``,
            ``metrics``, ``num_classes``.

    Raises:
        ValueError: If there is no teacher, or student and teacher share weights.

    Source:
        Hinton et al. 2015, https://arxiv.org/abs/1503.02531; You et al., KDD 2017.
    """

    distillation: Distillation

    def __init__(
        self,
        student: nn.Module,
        teachers: list[nn.Module],
        losses: dict[str, DistillationLoss] | list[DistillationLoss] | None = None,
        weighting: Weighting | None = None,
        task_weight: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(teachers, (list, tuple)) and not teachers:
            raise ValueError(
                "Expected at least one teacher, got none: list networks under `teachers`, or use "
                "Supervised to learn from labels alone."
            )
        self.distillation = Distillation(
            student, teachers, losses, weighting, self.task, task_weight
        )
        self._cached = False
        self._teacher_logits: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step, with the teachers' cached outputs where there are any."""
        if not self._cached:
            return super().training_step(batch, batch_idx)
        *batch, bits = batch
        self._teacher_logits = bits.view(torch.half).float()
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._teacher_logits = None

    def compute_losses(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Weighted losses of a batch by name; see ``Distiller.compute_losses``."""
        return self.distillation.losses_and_output(x, target, self._teacher_logits)[0]

    def _use_cache(self, cache: TeacherCache | None) -> None:
        self._cached = cache is not None
        if cache is not None:
            fill_cache(self, cache)
