from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_kd.distributed import sum_over_ranks, world_size
from lightning_kd.functional import (
    log_euclidean_distance,
    similarity_distance,
    simplex_projection,
    task_cross_entropy,
)
from lightning_kd.losses.base import DistillationLoss, LayerLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_one_of
from lightning_kd.utils.float32_state import Float32State

Metric = Literal["similarity_preserving", "log_euclidean"]


class GramLoss(Float32State, LayerLoss):
    """Match the similarities that the teachers find between the samples of a batch.

    Needs no adapter, whatever the shapes. Works on each rank's own batch.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        metric: ``"similarity_preserving"`` (row-normalised Gram matrices; a weight of 3000 is
            usual) or ``"log_euclidean"`` (matrix logarithms of cosine similarities).
        epsilon: Added to the diagonal before the logarithm.
        learn_weights: Learn how much each teacher is trusted, instead of the module's weighting:
            more for a teacher whose gradient agrees with that of the labelled samples.
        learning_rate: Learning rate of those weights, which stay >= 0 and sum to 1.
        weight: Multiplier of this loss in the total.

    Raises:
        ValueError: If the metric is unknown.

    Source:
        Tung & Mori 2019, https://arxiv.org/abs/1907.09682; Wu et al. 2019, "Distilled Person
        Re-Identification", CVPR, equations 5 to 8. Differs from the paper: gradients are compared
        at the layer instead of after a virtual step of all weights, by their cosine.
    """

    trust: Tensor

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        metric: Metric = "similarity_preserving",
        epsilon: float = 1e-3,
        learn_weights: bool = False,
        learning_rate: float = 0.01,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        check_one_of(metric, ("similarity_preserving", "log_euclidean"), "metric")
        self.metric, self.epsilon = metric, epsilon
        self.learn_weights, self.learning_rate = learn_weights, learning_rate

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Start from equal trust."""
        if self.learn_weights and not hasattr(self, "trust"):
            count = len(teachers)
            self.register_buffer("trust", torch.full((count,), 1 / count))

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """For the whole batch, a scalar."""
        if self.metric == "log_euclidean":
            return log_euclidean_distance(student, teacher, self.epsilon)
        return similarity_distance(student, teacher)

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        if not self.learn_weights:
            return super().forward(student, teachers, target)
        feature = self.student_feature(student)
        values = [
            self.compare(feature, self.teacher_feature(m, teacher), m)
            for m, teacher in zip(teachers.indices, teachers.outputs, strict=True)
        ]
        if target is not None and feature.requires_grad:
            self._learn(student, feature, teachers, target)
        trust = self.trust[list(teachers.indices)]
        trust = trust / trust.sum().clamp(min=1e-12)
        return dataclasses.replace(teachers, weights=trust).average(values)

    def _from_tensor(self, values: Tensor, layers: Sequence[str]) -> NetworkOutput:
        if self.learn_weights:  # by the labels' gradient, which needs logits beside the feature
            return DistillationLoss._from_tensor(self, values, layers)
        return super()._from_tensor(values, layers)

    def _learn(
        self,
        student: NetworkOutput,
        feature: Tensor,
        teachers: TeacherOutputs,
        target: Tensor,
    ) -> None:
        task = task_cross_entropy(student.logits, target).sum()
        # only directions matter; scaled up, gradients do not underflow in half precision, where
        # those of a sum of samples, at most 1 at a logit, do not overflow either
        scale = torch.full((), 2.0**8, device=feature.device)
        (task_gradient,) = torch.autograd.grad(
            task, feature, scale.to(task), retain_graph=True, allow_unused=True
        )
        if task_gradient is None:
            raise ValueError(
                f"Expected the student's logits to depend on {self.student_layer!r}, but they "
                f"do not: choose another layer, or learn_weights=False."
            )
        own = feature.detach().float().requires_grad_()  # so that nothing is rounded on the way
        gradients = [
            torch.autograd.grad(self.compare(own, self.teacher_feature(m, teacher), m), own)[0]
            for m, teacher in zip(teachers.indices, teachers.outputs, strict=True)
        ]
        agreement = torch.cosine_similarity(
            task_gradient.flatten()[None].float(), torch.stack(gradients).flatten(1)
        ).nan_to_num(0.0)
        agreement = sum_over_ranks(agreement) / world_size()
        step = torch.zeros_like(self.trust)
        step[list(teachers.indices)] = agreement.to(step)
        self.trust.copy_(simplex_projection(self.trust + self.learning_rate * step))
