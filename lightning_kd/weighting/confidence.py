from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.functional import confidence_weights, entropy_weights
from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting.base import Weighting


class Confidence(Weighting):
    r"""Trust a teacher for a sample by its cross-entropy with the label.

    .. math:: w_m = \frac{1}{M - 1} \Big(1 - \frac{e^{CE_m}}{\sum_j e^{CE_j}}\Big)

    Samples without a label, and all samples when the ensemble is evaluated (where weights that use
    the label would be cheating), are weighted as by ``Entropy``. No teacher gets more than
    1 / (M - 1): with two teachers one may get all the weight, with three no more than half.

    Args:
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Source:
        Zhang et al. 2022 (CA-MKD), https://arxiv.org/abs/2201.00007, equation 1. Its feature term
        is ``lightning_kd.losses.ConfidentHint``.
    """

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights for each sample, shape (M, B)."""
        logits = torch.stack([teacher.logits for teacher in teachers])
        return entropy_weights(logits) if target is None else confidence_weights(logits, target)
