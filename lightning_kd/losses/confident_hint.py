from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.features import find_layer
from lightning_kd.functional import confidence_weights, global_average_pool, hint_distance
from lightning_kd.losses.hint import Hint
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class ConfidentHint(Hint):
    """Match the teachers' last features, and trust a teacher by how it classifies the student's.

    The student's feature, projected to a teacher's shape, is passed through that teacher's own
    classifier; the lower the cross-entropy, the higher that teacher's weight for the sample.
    The module's weighting is not used.

    Args:
        student_layer: Dotted name of the student's last feature layer.
        teacher_layer: Dotted name of the teachers' layer before the classifier, or one name per
            teacher. Maps are averaged over positions before they are classified.
        teacher_classifier: Dotted name of the teachers' classifier, or one name per teacher.
        weight: Multiplier of this loss in the total; 50 in the paper.

    Source:
        Zhang et al. 2022 (CA-MKD), https://arxiv.org/abs/2201.00007, equations 4 to 6.
    """

    takes_unknown_classes = False

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        teacher_classifier: str | list[str],
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight=weight)
        self.teacher_classifier = teacher_classifier
        self._classifiers = _Unregistered()

    def attach(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """Find each teacher's classifier."""
        names = self.teacher_classifier
        if isinstance(names, str):
            names = [names] * len(teachers)
        if len(names) != len(teachers):
            raise ValueError(
                f"Expected one teacher_classifier for each of {len(teachers)} teachers, got "
                f"{len(names)}."
            )
        found = (find_layer(teacher, name) for teacher, name in zip(teachers, names, strict=True))
        self._classifiers = _Unregistered(found)

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        feature = self.student_feature(student)
        distances, logits = [], []
        for m, teacher in zip(teachers.indices, teachers.outputs, strict=True):
            adapted = self.projections[m](feature)
            distances.append(hint_distance(adapted, self.teacher_feature(m, teacher), self.power))
            with torch.no_grad():
                logits.append(self._classifiers[m](global_average_pool(adapted)))
        if target is None:
            target = torch.full((len(feature),), -1, device=feature.device)
        weights = confidence_weights(torch.stack(logits), target)
        return (weights * torch.stack(distances)).sum(0).mean()


class _Unregistered(tuple[nn.Module, ...]):
    """Parts of teachers: not registered, hence neither trained nor saved, and shared by copies."""

    def __deepcopy__(self, memo: Any) -> _Unregistered:
        return self
