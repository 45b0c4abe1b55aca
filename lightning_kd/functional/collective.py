"""Targets that a cohort makes from its own answers and the labels (KDCL)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.precision import full_precision


@full_precision
def min_logits(logits: Tensor, target: Tensor) -> Tensor:
    r"""Least logit of each class relative to the true class's.

    .. math:: z_j = \min_k (z_{k,j} - z_{k,y})

    Its cross-entropy is never above that of the best peer, on any sample.

    Args:
        logits: Shape (K, B, C), one row a peer.
        target: Labels, shape (B,); those of -1 give values without meaning.

    Returns:
        Logits, shape (B, C), 0 at the true class.

    Source:
        Guo et al. 2020 (KDCL), equation 7.
    """
    right = target.clamp(min=0)[None, :, None].expand(len(logits), -1, 1)
    return (logits - logits.gather(2, right)).amin(0)


@full_precision
def simplex_cross_entropy_weights(logits: Tensor, target: Tensor, steps: int = 60) -> Tensor:
    r"""Weights of the mixture of logits with the lowest cross-entropy on the batch.

    .. math:: \arg\min_a CE(\sum_k a_k z_k, y), \quad a_k \ge 0, \quad \sum_k a_k = 1

    The problem is convex; it is solved by exponentiated gradient with a fixed number of steps, on
    the device.

    Args:
        logits: Shape (K, B, C).
        target: Labels, shape (B,), -1 where unlabelled.
        steps: Of the solver.

    Returns:
        Shape (K,), summing to 1; equal where nothing is labelled.

    Source:
        Guo et al. 2020 (KDCL), equation 5.
    """
    known = (target >= 0).to(logits.dtype)
    right = F.one_hot(target.clamp(min=0), logits.shape[2]).to(logits.dtype)
    scale = known.sum().clamp(min=1)
    score = logits.new_zeros(len(logits))
    best, lowest = score.softmax(0), logits.new_tensor(torch.inf)
    for step in range(steps):
        weights = score.softmax(0)
        mixed = torch.einsum("k,kbc->bc", weights, logits)
        log_p = F.log_softmax(mixed, dim=1)
        loss = -((right * log_p).sum(1) * known).sum() / scale
        best = torch.where(loss < lowest, weights, best)
        lowest = torch.minimum(loss, lowest)
        error = (log_p.exp() - right) * known[:, None]
        slope = torch.einsum("bc,kbc->k", error, logits) / scale
        slope = slope - (weights * slope).sum()
        score = score - 4.0 / (1 + step) ** 0.5 * slope / slope.abs().amax().clamp(min=1e-12)
    return best
