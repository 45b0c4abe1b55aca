from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from lightning_kd.adapters import LayerPair
from lightning_kd.knowledge import Ensemble, Knowledge


class DistillationLoss(nn.Module, ABC):
    """What is transferred. Subclass it, give ``forward``, and name it by ``class_path``.

    Args:
        weight: Multiplier of this term in the total loss.
    """

    weight: float
    #: whether teachers may rule classes out, with logits of minus infinity
    takes_unknown_classes = True
    #: whether the teachers' logits are read; if nobody reads them, teachers stop before
    reads_logits = True
    #: whether a constant added to all of a teacher's logits counts
    reads_scale = False
    #: whether something flows into the student's own forward pass, by ``attach`` and ``before``
    changes_student = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def name(self) -> str:
        """Key of this term in the log: the class name in snake case."""
        return snake_case(self)

    def student_layers(self) -> Sequence[str]:
        """Layers of the student whose outputs this loss reads."""
        return ()

    def teacher_layers(self, index: int) -> Sequence[str]:
        """Layers of teacher ``index`` whose outputs this loss reads."""
        return ()

    def build(self, student: Knowledge, teachers: Sequence[Knowledge]) -> None:
        """Size adapters from a dry run; called once, before the optimizer is made."""

    def attach(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """Reach into the networks themselves; called after ``build``, and before each fit.

        Do not register a teacher: it would be trained and saved.
        """

    def before(self, teachers: Sequence[Knowledge], indices: Sequence[int]) -> None:
        """See what the teachers of these indices said, before the student runs."""

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


class LayerLoss(LayerPair, DistillationLoss):
    """A loss between one layer of the student and one of each teacher.

    Give ``forward``, or only ``compare``. One that reads the teachers' logits too sets
    ``reads_logits``.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer; a list gives one name for each teacher.
        weight: Multiplier of this term in the total loss.
    """

    reads_logits = False

    def __init__(
        self, student_layer: str, teacher_layer: str | list[str], weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Distance of student features (B, ...) to teacher ``index``'s: per sample (B,), or 0-d."""
        raise NotImplementedError(f"{type(self).__name__} gives neither compare nor forward.")

    def forward(self, student: Knowledge, teachers: Ensemble, target: Tensor | None) -> Tensor:
        """Weighted mean of ``compare`` over the teachers; see ``DistillationLoss.forward``."""
        feature = self.student_feature(student)
        return teachers.average(
            [
                self.compare(feature, self.teacher_feature(m, teacher), m)
                for m, teacher in zip(teachers.indices, teachers.members, strict=True)
            ]
        )


def by_name(losses: Sequence[DistillationLoss]) -> dict[str, DistillationLoss]:
    """Key each loss by its name in the log; equal names are numbered.

    Raises:
        ValueError: If a name is one that the log needs for something else.
    """
    for loss in losses:
        if loss.name in ("loss", "task", "gate"):
            raise ValueError(
                f"Expected a loss whose name is not `loss`, `task` or `gate`, which are taken in "
                f"the log, got {type(loss).__name__}: rename the class."
            )
    return numbered(losses)


T = TypeVar("T", bound=nn.Module)


def numbered(parts: Sequence[T]) -> dict[str, T]:
    """Key each part by its ``name``; equal names are numbered."""
    named: dict[str, T] = {}
    for part in parts:
        count, key = 1, str(part.name)
        while key in named:
            count += 1
            key = f"{part.name}_{count}"
        named[key] = part
    return named


def snake_case(part: object) -> str:
    """The name of its class, as keys in the log are written."""
    return re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(part).__name__
    ).lower()
