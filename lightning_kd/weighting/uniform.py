from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Weighting


class Uniform(Weighting):
    """Every teacher has the same weight.

    Args:
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Source:
        Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2; You et al., KDD 2017.
    """

    varies = False
    reads_logits = False

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights 1 / M, shape (M,)."""
        m = len(teachers)
        return torch.full((m,), 1 / m, device=teachers[0].logits.device)
