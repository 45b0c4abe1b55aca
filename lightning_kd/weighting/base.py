from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lightning_kd.functional.checks import check_space
from lightning_kd.knowledge import Ensemble, Knowledge

Space = Literal["probability", "logit"]


class Weighting(nn.Module, ABC):
    """How far each teacher is trusted, and where their answers are averaged.

    Args:
        space: ``"probability"`` (arithmetic mean of softened answers) or ``"logit"`` (mean of
            logits, which needs teachers of comparable logit scale).

    Raises:
        ValueError: If ``space`` is neither.
    """

    def __init__(self, space: Space = "probability") -> None:
        super().__init__()
        check_space(space)
        self.space = space

    #: whether the teachers' logits are read in training
    reads_logits = True
    #: whether weights change during training, and are therefore logged as ``train/trust_<index>``
    varies = True

    @property
    def strength(self) -> Tensor | float:
        """Multiplier of all distillation terms; below 1 where no teacher has much to say."""
        return 1.0

    def student_layers(self) -> Sequence[str]:
        """Layers of the student whose outputs this weighting reads."""
        return ()

    def teacher_layers(self, index: int) -> Sequence[str]:
        """Layers of teacher ``index`` whose outputs this weighting reads."""
        return ()

    def build(self, student: Knowledge, teachers: Sequence[Knowledge]) -> None:
        """Size itself from a dry run; called once, before the optimizer is made."""

    def active(self, num_teachers: int) -> Sequence[int]:
        """Teachers to run on this batch; asked before they run, so the others cost nothing."""
        return range(num_teachers)

    @abstractmethod
    def forward(
        self, teachers: Sequence[Knowledge], student: Knowledge, target: Tensor | None
    ) -> Tensor:
        """Trust in each teacher that ran.

        Args:
            teachers: Knowledge of the active teachers.
            student: The student's.
            target: Labels (B, ...), -1 where unlabelled; None where there are none, and always
                when an ensemble is measured.

        Returns:
            Weights, shape (M,) or (M, B), summing to 1 over M; detached, unless they learn through
            the losses that they weigh.
        """

    def loss(self, teachers: Ensemble, target: Tensor | None) -> Tensor | None:
        """Loss of the weighting itself, logged as ``train/gate``; None if it learns nothing so."""
        return None

    # ------------------------------------------------------------------ beside the training steps

    #: whether ``calibrate`` is to be called
    wants_images = False

    def calibrate(self, images: Sequence[Tensor], teachers: Sequence[nn.Module]) -> None:
        """Look at batches of training images (B, C, H, W) once, before training."""

    def observe(self, student: Knowledge, teachers: Sequence[Knowledge], target: Tensor) -> None:
        """See one batch of validation answers of the student and of all teachers."""

    def update(self) -> None:
        """Learn from what was observed; called at the end of each validation, on all ranks."""
