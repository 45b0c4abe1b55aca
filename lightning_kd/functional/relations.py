"""Distances between two networks in how the samples of a batch relate to each other.

Features may differ in width. Every value here is for the whole batch (0-d), and depends on its size
and contents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.features import unit_length
from lightning_kd.functional.precision import full_precision, widest


def _check_batch(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    # torch.pdist ends the process at an empty batch
    if len(student) != len(teacher) or student.dim() < 2 or not len(student):
        raise ValueError(
            f"Expected features (B, ...) of one batch, B >= 1, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    return student.flatten(1), teacher.flatten(1)


@full_precision
def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Similarity-preserving distance: Gram matrices, each row of unit length.

    .. math:: \frac{1}{B^2} \| \bar G_S - \bar G_T \|_F^2, \quad G = Q Q^\top

    Args:
        student: Features, shape (B, ...).
        teacher: Features, shape (B, ...); detach them.

    Returns:
        A scalar.

    Source:
        Tung & Mori 2019 (SP), https://arxiv.org/abs/1907.09682, equations 1 to 4.
    """
    s, t = _check_batch(student, teacher)
    difference = unit_length(s @ s.T) - unit_length(t @ t.T)
    distance: Tensor = difference.square().mean()
    return distance


class _SymmetricLog(torch.autograd.Function):
    """Logarithm of a symmetric positive definite matrix, with a gradient that never divides by 0.

    ``eigh``'s own gradient divides by the differences of eigenvalues. The logarithm's does not:
    its divided differences tend to 1 / lambda where two eigenvalues meet (Daleckii & Krein).
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        # NaN has no eigenvalues; the loss should be NaN then, which the module reports
        finite = torch.isfinite(matrix).all()
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        values, vectors = torch.linalg.eigh(torch.where(finite, matrix, eye))
        values = torch.where(finite, values, torch.nan)
        values = values.clamp(min=torch.finfo(matrix.dtype).tiny)
        ctx.save_for_backward(values, vectors)
        logarithm: Tensor = (vectors * values.log()) @ vectors.mT
        return logarithm

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        values, vectors = ctx.saved_tensors
        gap = values[:, None] - values[None, :]
        mean = (values[:, None] + values[None, :]) / 2
        near = gap.abs() < 1e-6 * mean
        ratio = (values.log()[:, None] - values.log()[None, :]) / torch.where(near, 1.0, gap)
        divided = torch.where(near, 1 / mean, ratio)
        grad = (grads[0] + grads[0].mT) / 2
        back: Tensor = vectors @ (divided * (vectors.mT @ grad @ vectors)) @ vectors.mT
        return back


@full_precision
def log_euclidean_distance(student: Tensor, teacher: Tensor, epsilon: float = 1e-3) -> Tensor:
    r"""Distance between the matrix logarithms of two similarity matrices.

    .. math:: \frac{1}{B^2} \| \log(A_S + \epsilon I) - \log(A_T + \epsilon I) \|_F^2,
        \quad A = X X^\top

    with the rows of X clipped at 0 and scaled to unit length, so that similarities lie in [0, 1].

    Args:
        student: Features, shape (B, ...).
        teacher: Features, shape (B, ...); detach them.
        epsilon: Added to the diagonal: A is singular if a batch has more samples than features.

    Returns:
        A scalar; computed in float64 where there is one: logarithms of small eigenvalues are
        delicate.

    Source:
        Wu et al. 2019, "Distilled Person Re-Identification", CVPR, equation 5. Differs from the
        paper: divided by B squared, so that the weight does not depend on the batch size.
    """
    s, t = _check_batch(student, teacher)

    def log(features: Tensor) -> Tensor:
        rows = unit_length(F.relu(widest(features)))
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        matrix: Tensor = _SymmetricLog.apply(rows @ rows.T + epsilon * eye)
        return matrix

    distance: Tensor = (log(s) - log(t)).square().mean()
    return distance.to(student.dtype)


def _distances(features: Tensor) -> Tensor:
    """Euclidean distances of all pairs over their mean, shape (B (B - 1) / 2,)."""
    pairs = F.pdist(features)
    positive = pairs > 0  # the mean over distinct points, without a boolean index
    mean = pairs.sum() / positive.sum().clamp(min=1)
    return pairs / torch.where(mean > 0, mean, 1.0)


def _angles(features: Tensor) -> Tensor:
    """Cosine at j of each triple (i, j, k), shape (B, B, B), j first."""
    edges = unit_length(features[None, :, :] - features[:, None, :], 2)
    return edges @ edges.mT


@full_precision
def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance between pairwise distances, each in units of its network's mean distance.

    Args:
        student: Features, shape (B, ...).
        teacher: Features, shape (B, ...); detach them.

    Returns:
        A scalar, the mean over all B squared ordered pairs as published (B of them are 0).

    Source:
        Park et al. 2019 (RKD), https://arxiv.org/abs/1904.05068, equations 5 to 7.
    """
    s, t = _check_batch(student, teacher)
    batch = len(s)
    return 2 * F.smooth_l1_loss(_distances(s), _distances(t), reduction="sum") / batch**2


@full_precision
def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance between the angles of all triples of samples; memory grows with B cubed.

    Args:
        student: Features, shape (B, ...).
        teacher: Features, shape (B, ...); detach them.

    Returns:
        A scalar, the mean over all B cubed triples as published.

    Source:
        Park et al. 2019 (RKD), https://arxiv.org/abs/1904.05068, equations 8 and 9.
    """
    s, t = _check_batch(student, teacher)
    return F.smooth_l1_loss(_angles(s), _angles(t))


@full_precision
def probabilistic_distance(student: Tensor, teacher: Tensor, epsilon: float = 1e-7) -> Tensor:
    r"""KL divergence of each sample's distribution of cosine similarities to the batch.

    .. math:: \frac{1}{B^2} \sum_{ij} p^T_{ij} \log(p^T_{ij} / p^S_{ij}), \quad
        p_{ij} = k_{ij} / \sum_l k_{il}, \quad k_{ij} = (\cos(x_i, x_j) + 1) / 2

    Args:
        student: Features, shape (B, ...).
        teacher: Features, shape (B, ...); detach them.
        epsilon: Keeps logarithms of opposite samples finite.

    Returns:
        A scalar.

    Source:
        Passalis & Tefas 2018 (PKT), https://arxiv.org/abs/1803.10837, equations 5 to 9. Differs
        from the paper: mean over all pairs, the sample itself included, as the authors' code does.
    """
    s, t = _check_batch(student, teacher)

    def log_probabilities(features: Tensor) -> Tensor:
        rows = unit_length(features)
        # rounding takes opposite samples below -1
        kernel = ((rows @ rows.T + 1) / 2).clamp(min=0) + epsilon
        return kernel.log() - kernel.sum(1, keepdim=True).log()

    log_q, log_p = log_probabilities(s), log_probabilities(t)
    return (log_p.exp() * (log_p - log_q)).mean()
