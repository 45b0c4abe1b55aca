"""Contrastive learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.features import unit_length
from lightning_kd.functional.precision import full_precision


@full_precision
def info_nce(anchors: Tensor, others: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Cross-entropy of matching each anchor to its own sample, by cosine similarity.

    .. math:: -\log \frac{\exp(\cos(a_i, o_i) / \tau)}{\sum_j \exp(\cos(a_i, o_j) / \tau)}

    Args:
        anchors: Shape (B, D).
        others: Shape (N, D), N >= B; the first B belong to the anchors, in order.
        temperature: :math:`\tau`, > 0.

    Returns:
        Per anchor, shape (B,).

    Source:
        Oord et al. 2018, https://arxiv.org/abs/1807.03748, equation 4; with cosines Fang et al.
        2021 (CMI), https://arxiv.org/abs/2105.08584, equation 7.
    """
    alike = unit_length(anchors) @ unit_length(others).T / temperature
    own = torch.arange(len(anchors), device=anchors.device)
    return F.cross_entropy(alike, own, reduction="none")
