from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.functional import (
    full_precision,
    global_average_pool,
    kl_divergence,
    unit_length,
)
from lightning_kd.losses.base import LayerLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_one_of, check_positive


class GraphDistillation(LayerLoss):
    r"""Teachers and student are vertices; knowledge flows to the student along learned edges.

    .. math:: \sum_m e_m [\lambda_z \tau^2 KL(p_m^T \| p_S^T) + \lambda_f\, d(f_m, \phi_m(f_S))]

    The edges e are a softmax over the teachers (and the student's own edge, whose score stays 0 and
    which adds no loss). They are trained through the loss that they weight, together with the
    student; the module's weighting is not used.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        edges: ``"sample"``: a small network on a teacher's feature and logits scores each sample
            (Luo et al.); ``"vertex"``: one learned score for each teacher (Zhang & Peng).
        distance: ``"cosine"`` of the features of each sample, or ``"mmd"`` of their distribution
            over the batch under a bilinear kernel.
        temperature: Softening of the logits, > 0.
        logit_weight: Lambda, multiplier of the divergence of the logits.
        feature_weight: Lambda, multiplier of the distance of the features.
        self_edge: Whether the student has an edge of its own, which takes trust from the teachers.
        weight: Multiplier of this loss in the total.

    Raises:
        ValueError: If an option is unknown or the temperature is not positive.

    Source:
        Zhang & Peng 2018, "Better and Faster", IJCAI; Luo et al. 2018, "Graph Distillation for
        Action Detection with Privileged Modalities", https://arxiv.org/abs/1712.00108, equation 4.
        Differs from the papers: no code exists; KL replaces the optimal transport of the logits
        graph, and features are averaged over positions.
    """

    takes_unknown_classes = False
    reads_logits = True

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        edges: Literal["sample", "vertex"] = "sample",
        distance: Literal["cosine", "mmd"] = "cosine",
        temperature: float = 4.0,
        logit_weight: float = 1.0,
        feature_weight: float = 1.0,
        self_edge: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        check_positive(temperature, "temperature")
        check_one_of(edges, ("sample", "vertex"), "edges")
        check_one_of(distance, ("cosine", "mmd"), "distance")
        self.edges, self.distance, self.temperature = edges, distance, temperature
        self.logit_weight, self.feature_weight = logit_weight, feature_weight
        self.self_edge = self_edge
        self.projections = nn.ModuleList()
        self.scorers = nn.ModuleList()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make a projection and a scorer for each teacher."""
        if self.projections:
            return
        student_width = global_average_pool(self.student_feature(student)).shape[1]
        for m, teacher in enumerate(teachers):
            width = global_average_pool(self.teacher_feature(m, teacher)).shape[1]
            self.projections.append(nn.Linear(student_width, width))
            inputs = width + teacher.logits.shape[1] if self.edges == "sample" else 1
            hidden = [nn.Linear(inputs, 32), nn.ReLU()] if self.edges == "sample" else []
            last = nn.Linear(32 if hidden else 1, 1)
            nn.init.zeros_(last.weight)  # all edges start equal
            nn.init.zeros_(last.bias)
            self.scorers.append(nn.Sequential(*hidden, last))

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        student_feature = global_average_pool(self.student_feature(student))
        scores, values = [], []
        for m, teacher in zip(teachers.indices, teachers.outputs, strict=True):
            teacher_feature = global_average_pool(self.teacher_feature(m, teacher))
            scorer = self.scorers[m]
            dtype = next(scorer.parameters()).dtype
            inputs = teacher_feature.new_ones(len(teacher_feature), 1, dtype=dtype)
            if self.edges == "sample":
                inputs = torch.cat([teacher_feature.to(dtype), teacher.logits.to(dtype)], 1)
            scores.append(scorer(inputs)[:, 0])
            t = self.temperature
            logits = t**2 * kl_divergence(student.logits, teacher.logits, t, t)
            projected = self.projections[m](student_feature)
            features = _vertex_distance(projected, teacher_feature, self.distance)
            values.append(self.logit_weight * logits + self.feature_weight * features)
        if self.self_edge:
            scores.append(torch.zeros_like(scores[0]))
        edges = torch.stack(scores).to(values[0]).softmax(0)[: len(values)]
        return (edges * torch.stack(values)).sum(0).mean()


@full_precision
def _vertex_distance(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Distance of two vertices' features (B, D), shape (B,)."""
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher)
    s, t = unit_length(student), unit_length(teacher)
    # with k(a, b) = (a . b)^2 the squared discrepancy is that of the mean outer products
    return (s.T @ s / len(s) - t.T @ t / len(t)).square().sum().expand(len(s))
