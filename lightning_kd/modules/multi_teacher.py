from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge
from lightning_kd.losses import DistillationLoss, SoftTarget
from lightning_kd.modules.batched import Batched
from lightning_kd.modules.cached import fill
from lightning_kd.modules.one_student import OneStudent
from lightning_kd.teachers import TeacherCache
from lightning_kd.weighting import Weighting


class MultiTeacher(OneStudent):
    r"""One student learns from labels and from one or more frozen teachers.

    .. math:: w_{task} CE(z^S, y) + \sum_i w_i L_i(student, teachers)

    With one teacher and the default loss it is Hinton's distillation.

    Args:
        student: The network to train.
        teachers: One or more trained networks of the same classes; they are never touched.
        losses: What is transferred, each with its weight; ``null``: ``SoftTarget`` at temperature
            4, weight 0.9.
        weighting: Whom to trust; ``null``: ``Uniform``.
        task_weight: Multiplier of the cross-entropy with the labels; labels of -1 are left out.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        optimizer: ``null``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``null``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        num_classes: Of the data, checked against the networks; the command line fills it in.

    Raises:
        ValueError: If there is no teacher, or student and teacher share weights.

    Source:
        Hinton et al. 2015, https://arxiv.org/abs/1503.02531; You et al., KDD 2017.
    """

    _said: Tensor | None

    def __init__(
        self,
        student: nn.Module,
        teachers: list[nn.Module],
        losses: list[DistillationLoss] | None = None,
        weighting: Weighting | None = None,
        task_weight: float = 0.1,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError(
                "Expected at least one teacher, got none: list networks under `teachers`, or use "
                "Supervised to learn from labels alone."
            )
        self.take(
            student,
            teachers,
            [SoftTarget(temperature=4.0, weight=0.9)] if losses is None else losses,
            weighting,
            task_weight,
            label_smoothing,
            optimizer,
            scheduler,
            scheduler_interval,
            num_classes,
        )
        self._cached, self._said = False, None
        self._together: Batched | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step, with what teachers said of its images where that is cached."""
        if not self._cached:
            return super().training_step(batch, batch_idx)
        *batch, bits = batch
        self._said = bits.view(torch.half)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._said = None

    def samples_in(self, batch: Any) -> int:
        """Images in a training batch of this process."""
        return super().samples_in(batch[:2] if self._cached else batch)

    def teach(self, x: Tensor, indices: Sequence[int], logits: bool = True) -> list[Knowledge]:
        """Ask the teachers of these indices, or recall what they said."""
        if self._said is not None:
            said = self._said.float()
            return [Knowledge(said[:, m]) for m in indices]
        if self._together is None or not logits or len(indices) < self.voices:
            return super().teach(x, indices, logits)
        for teacher in self._teachers():
            teacher.keep_in_eval()
        with torch.no_grad():
            answers = self._together([x] * self.voices)
        return [each.spread(said) for each, said in zip(self._teachers(), answers, strict=True)]

    def ask_together(self) -> None:
        """Run all teachers as one network from now on, once the dry run has been made.

        Raises:
            ValueError: If there is one only, or they differ in more than their weights.
        """
        layers = {teacher.tap.layers for teacher in self._teachers()}
        if self.voices < 2 or len(layers) > 1:
            raise ValueError(
                f"Expected two or more teachers whose same layers are read with batched=True, got "
                f"{self.voices} with layers {sorted(layers)}: leave it out."
            )
        first = next(self._teachers())
        self._together = Batched(self.networks(), first.tap, "teacher")

    def use_cache(self, cache: TeacherCache | None) -> None:
        """Ask the teachers once about every image, unless an earlier run has."""
        self._cached = cache is not None
        if cache is not None:
            fill(self, cache, list(self._teachers()), [*self._losses(), self.weighting])
