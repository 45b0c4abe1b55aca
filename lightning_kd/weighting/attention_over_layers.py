from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.features import LayerPair
from lightning_kd.functional import global_average_pool
from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Space, Weighting


class AttentionOverLayers(LayerPair, Weighting):
    r"""Choose among the teachers' layers for each sample by attention.

    .. math:: w_m = \mathrm{softmax}_m \frac{\langle Q \bar x_S, K_m \bar x_m \rangle}{\sqrt{d}}

    with :math:`\bar x` the features averaged over positions. Query and keys are trained through the
    losses that they weight, which favours what is easy to imitate. To choose among several layers
    of one teacher, list that teacher once for each layer.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        dimension: d, the width of queries and keys.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Source:
        Chen et al. 2021 (SemCKD), https://arxiv.org/abs/2012.03236, equations 4 and 5. Differs from
        the paper: pooled features instead of similarity matrices are projected, and the choice is
        among teachers.
    """

    reads_logits = False

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        dimension: int = 32,
        space: Space = "probability",
    ) -> None:
        super().__init__(space)
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.dimension = dimension
        self.keys = nn.ModuleList()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make the query and one key for each teacher."""
        if self.keys:
            return
        width = global_average_pool(self.student_feature(student)).shape[1]
        self.query = nn.Linear(width, self.dimension, bias=False)
        for m, teacher in enumerate(teachers):
            width = global_average_pool(self.teacher_feature(m, teacher)).shape[1]
            self.keys.append(nn.Linear(width, self.dimension, bias=False))

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights for each sample, shape (M, B), with gradient."""
        query = self.query(global_average_pool(self.student_feature(student)).detach())
        scores = [
            (query * self.keys[m](global_average_pool(self.teacher_feature(m, teacher)))).sum(1)
            for m, teacher in enumerate(teachers)
        ]
        stacked = torch.stack(scores).float() / math.sqrt(self.dimension)
        return stacked.softmax(0).clamp(min=1e-12)
