from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_space

Space = Literal["probability", "logit"]


class Weighting(nn.Module, ABC):
    """How much each teacher is trusted, and in which space teacher outputs are averaged.

    Args:
        space: ``"probability"`` (arithmetic mean of softened outputs) or ``"logit"`` (mean of
            logits, which needs teachers of comparable logit scale).

    Raises:
        ValueError: If ``space`` is neither.
    """

    def __init__(self, space: Space = "probability") -> None:
        super().__init__()
        check_space(space)
        self.space = space
        self._was_checked = self._sized = False

    #: whether the teachers' logits are read in training
    reads_logits = True
    #: whether weights change during training, and are therefore logged as ``train/trust_<index>``
    varies = True

    @property
    def strength(self) -> Tensor | float:
        """Multiplier of all distillation losses; below 1 where teachers have little to teach."""
        return 1.0

    def student_layers(self) -> Sequence[str]:
        """Layers of the student whose outputs this weighting reads."""
        return ()

    def teacher_layers(self, index: int) -> Sequence[str]:
        """Layers of teacher ``index`` whose outputs this weighting reads."""
        return ()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Size parameters from a dry run; called once, before the optimizer is created."""

    def active(self, num_teachers: int) -> Sequence[int]:
        """Teachers to run on this batch; called before they run, so the others cost nothing."""
        return range(num_teachers)

    @abstractmethod
    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Trust in each teacher that ran.

        Args:
            student: Output of the student.
            teachers: Outputs of the active teachers.
            target: Labels (B, ...), -1 where unlabelled; None where there are none, and always
                when the ensemble is evaluated.

        Returns:
            Weights, shape (M,) or (M, B), summing to 1 over M; detached, unless they are trained
            through the losses that they weight.
        """

    def loss(self, teachers: TeacherOutputs, target: Tensor | None) -> Tensor | None:
        """Loss of the weighting itself, logged as ``train/gate``; None if it has none."""
        return None

    # ------------------------------------------------------------------ outside the training steps

    #: whether ``calibrate`` should be called
    wants_images = False

    def calibrate(self, images: Sequence[Tensor], teachers: Sequence[nn.Module]) -> None:
        """Use batches of training images (B, C, H, W) once, before training."""

    def observe(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor
    ) -> None:
        """Record one batch of validation outputs of the student and of all teachers."""

    def after_validation(self) -> None:
        """Update from what was observed; called at the end of each validation, on all ranks."""


def check_weights(weights: Any, weighting: Weighting, count: int, batch: int) -> None:
    """Check a weighting's weights: the shape always, values once, since that waits for the device.

    Raises:
        ValueError: If they are not of shape (M,) or (M, B), or not a convex combination.
    """
    name = type(weighting).__name__
    if not isinstance(weights, Tensor) or weights.shape not in ((count,), (count, batch)):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"Expected {name} to return weights of shape ({count},) or ({count}, {batch}), one "
            f"row per teacher, got {got}."
        )
    if weighting._was_checked:
        return
    weighting._was_checked = True
    total = weights.detach().float().sum(0)
    if not bool((weights >= 0).all() & ((total - 1).abs() < 1e-2).all()):
        raise ValueError(
            f"Expected {name} to return weights >= 0 that sum to 1 over the teachers, got a "
            f"sum of {float(total.flatten()[0]):.3g} and a least weight of "
            f"{float(weights.min()):.3g}."
        )


def refuse_memory(weighting: Weighting) -> None:
    """Raise ``ValueError`` unless a weighting depends on the batch alone, as a cohort needs."""
    if weighting.wants_images or type(weighting).observe is not Weighting.observe:
        raise ValueError(
            f"Expected a weighting that depends on the batch alone for the teachers of a cohort, "
            f"such as Uniform or Confidence, got {type(weighting).__name__}."
        )
