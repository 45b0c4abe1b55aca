from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_kd.features import Projection, find_layer
from lightning_kd.functional import full_precision
from lightning_kd.losses.base import LayerLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class KnowledgeFlow(LayerLoss):
    r"""Let teachers' features flow into the student during training, and wean it off them.

    In training, the student's layer outputs :math:`w_0 x_S + \sum_m w_m Q_m(x_m)` with learned
    projections Q and w a softmax of learned scores. The loss is the dependency
    :math:`-\log w_0`: raise its weight during training (``LossWeightScheduler`` on
    ``losses.knowledge_flow``), so that the student stands alone at the end. In validation, test and
    export it always does. One instance per layer.

    Args:
        student_layer: Dotted name of the student layer that teachers flow into.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        weight: Multiplier of this loss in the total.

    Source:
        Liu et al. 2019, https://openreview.net/forum?id=BJeOioA9Y7, equations 1 and 2. Differs from
        the paper: one teacher layer for each student layer, and no term that keeps the student near
        its earlier output, which needs the weights of an earlier step.
    """

    changes_student = True

    def __init__(
        self, student_layer: str, teacher_layer: str | list[str], weight: float = 0.1
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projections = nn.ModuleList()
        self._handle: RemovableHandle | None = None
        self._flow: tuple[Sequence[NetworkOutput], Sequence[int]] | None = None

    @property
    def independence(self) -> Tensor:
        """Share of the student's own feature in its layer's output, in (0, 1)."""
        return self.scores.softmax(0)[0]

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make a projection from each teacher, and the scores."""
        if not self.projections:
            shape = self.student_feature(student).shape
            for m, teacher in enumerate(teachers):
                self.projections.append(Projection(self.teacher_feature(m, teacher).shape, shape))
            self.scores = nn.Parameter(torch.zeros(1 + len(teachers)))

    def _compared(self, student: NetworkOutput) -> Tensor:
        return student.logits  # the feature was mixed before the loss is called

    def attach(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """Hook the student's layer, again if it was replaced (as by SyncBatchNorm)."""
        if self._handle is not None:
            self._handle.remove()
        layer = find_layer(student, self.student_layer)
        self._handle = layer.register_forward_hook(_Inflow(self))

    def before_student(self, teachers: Sequence[NetworkOutput], indices: Sequence[int]) -> None:
        """Let these teachers flow into the next forward pass."""
        self._flow = (teachers, indices)

    def after_student(self) -> None:
        """Let no teacher flow into another pass."""
        self._flow = None

    def mix(self, own: Tensor) -> Tensor:
        """Student's feature with the teachers' mixed in, in the shape of ``own``."""
        assert self._flow is not None
        members, indices = self._flow
        shares = _shares(self.scores, indices)
        mixed = shares[0].to(own.dtype) * own
        for share, m, teacher in zip(shares[1:], indices, members, strict=True):
            mixed = mixed + share.to(own.dtype) * self.projections[m](
                self.teacher_feature(m, teacher)
            )
        return mixed

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Dependency on the teachers, a scalar >= 0."""
        self._flow = None
        return -_shares(self.scores, teachers.indices)[0].log()


@full_precision
def _shares(scores: Tensor, indices: Sequence[int]) -> Tensor:
    """Softmax over the student and the teachers that ran, the student first."""
    return scores[[0, *(1 + m for m in indices)]].softmax(0)


class _Inflow:
    """A forward hook that changes the student's feature only between ``before`` and ``forward``."""

    def __init__(self, flow: KnowledgeFlow) -> None:
        self.flow = flow

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        idle = self.flow._flow is None or not self.flow.training
        return None if idle else self.flow.mix(output)

    def __deepcopy__(self, memo: Any) -> _Inflow:
        """A copy of the student (for an export) has no teachers to mix in."""
        return _Inflow(_NoFlow())  # type: ignore[arg-type]


class _NoFlow:
    _flow = None
