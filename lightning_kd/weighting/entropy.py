from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.functional import entropy_weights
from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Weighting


class Entropy(Weighting):
    r"""Trust a teacher for a sample by how certain it is; needs no labels.

    .. math:: w_m = \frac{1}{M - 1} \Big(1 - \frac{H_m}{\sum_j H_j}\Big)

    A teacher that is certain but wrong is trusted; ``Confidence`` avoids that where there are
    labels.

    Args:
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Source:
        Kwon et al. 2020 (EBKD), "Adaptive knowledge distillation based on entropy", ICASSP.
    """

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights for each sample, shape (M, B)."""
        return entropy_weights(torch.stack([teacher.logits for teacher in teachers]))
