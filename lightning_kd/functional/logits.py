"""Distances between logits, and their standardisation."""

from __future__ import annotations

from torch import Tensor

from lightning_kd.functional.divergence import _per_sample
from lightning_kd.functional.precision import full_precision
from lightning_kd.utils.checks import check_same_shape


@full_precision
def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference between logits, per sample.

    .. math:: \frac{1}{K} \sum_k (z_k^S - z_k^T)^2

    Args:
        student: Logits, shape (B, K, ...).
        teacher: Logits, shape (B, K, ...); detach them.

    Returns:
        Squared difference, shape (B,), averaged over classes and positions.

    Raises:
        ValueError: If shapes differ.

    Source:
        Ba & Caruana 2014, https://arxiv.org/abs/1312.6184, equation 1. Differs from the paper: mean
        over classes instead of half the sum, so that the weight does not depend on K.

    Example:
        >>> import torch
        >>> logit_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([5.])
    """
    check_same_shape(student, teacher, "logits")
    return _per_sample((student - teacher).square().mean(1))


@full_precision
def logit_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference between logits (B, K), per sample (B,).

    Source:
        Fang et al. 2019 (DFAD), https://arxiv.org/abs/1912.11006, equation 3.
    """
    check_same_shape(student, teacher, "logits")
    return (student - teacher).abs().flatten(1).mean(1)


@full_precision
def standardize(logits: Tensor) -> Tensor:
    r"""Z-score of each sample's logits: mean 0, standard deviation 1 over the classes.

    Args:
        logits: Shape (B, K, ...), K >= 3.

    Returns:
        Shape (B, K, ...); the deviation is the unbiased one, as published, but at least 0.001: for
        logits that are all equal it is 0, and the gradient would be unbounded.

    Raises:
        ValueError: If there are fewer than three classes: two z-scores are always the same two.

    Source:
        Sun et al. 2024, https://arxiv.org/abs/2403.01427, algorithm 1.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"Expected logits of at least three classes to standardise, got {logits.shape[1]}, "
            f"whose z-scores are the same for every sample: use SoftTarget."
        )
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
    return centred / (variance.clamp(min=1e-6).sqrt() + 1e-7)
