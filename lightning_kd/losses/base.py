from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.knowledge import Ensemble, Knowledge


class DistillationLoss(nn.Module, ABC):
    """What is transferred. Subclass it, give ``forward``, and name it by ``class_path``.

    Args:
        weight: Multiplier of this term in the total loss.
    """

    weight: float

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def name(self) -> str:
        """Key of this term in the log: the class name in snake case."""
        return re.sub(
            r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__
        ).lower()

    def student_layers(self) -> Sequence[str]:
        """Layers of the student whose outputs this loss reads."""
        return ()

    def teacher_layers(self, index: int) -> Sequence[str]:
        """Layers of teacher ``index`` whose outputs this loss reads."""
        return ()

    def build(self, student: Knowledge, teachers: Sequence[Knowledge]) -> None:
        """Size adapters from a dry run; called once, before the optimizer is made."""

    @abstractmethod
    def forward(self, student: Knowledge, teachers: Ensemble, target: Tensor | None) -> Tensor:
        """Compute the unweighted loss of one batch.

        Args:
            student: With gradient.
            teachers: Detached, with the weights that the weighting gave them.
            target: Labels (B, ...), -1 where unlabelled, or None.

        Returns:
            A scalar.
        """


class LayerLoss(DistillationLoss):
    """A loss between one layer of the student and one of each teacher.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer; a list gives one name for each teacher.
        weight: Multiplier of this term in the total loss.
    """

    def __init__(
        self, student_layer: str, teacher_layer: str | list[str], weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer

    def student_layers(self) -> Sequence[str]:
        """The one student layer."""
        return (self.student_layer,)

    def teacher_layers(self, index: int) -> Sequence[str]:
        """The one layer of teacher ``index``."""
        if isinstance(self.teacher_layer, str):
            return (self.teacher_layer,)
        if index >= len(self.teacher_layer):
            raise ValueError(
                f"Expected one teacher_layer for each teacher, got {len(self.teacher_layer)} "
                f"names and at least {index + 1} teachers."
            )
        return (self.teacher_layer[index],)

    def teacher_feature(self, index: int, teacher: Knowledge) -> Tensor:
        """Output of the layer that this loss reads from teacher ``index``."""
        return teacher.feature(self.teacher_layers(index)[0])
