from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.functional import lowest_loss_weights
from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Weighting


class LowestLoss(Weighting):
    """Use one teacher for each sample: the one with the lowest cross-entropy with the label.

    Without a label (and always when the ensemble is evaluated) it is that of the lowest entropy.
    For feature losses this chooses one teacher's feature map for each sample.

    Args:
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Source:
        Shen et al. 2019, "Customizing Student Networks From Heterogeneous Teachers", ICCV (lowest
        entropy); Guo et al. 2020 (KDCL naive), CVPR.
    """

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """1 for the chosen teacher of each sample, else 0, shape (M, B)."""
        return lowest_loss_weights(torch.stack([t.logits for t in teachers]), target)
