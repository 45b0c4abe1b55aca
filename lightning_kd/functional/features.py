"""Distances between feature tensors, per sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.precision import full_precision
from lightning_kd.utils.checks import check_same_shape


@full_precision
def hint_distance(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    r"""Mean distance between two feature tensors, per sample.

    .. math:: \frac{1}{n} \sum_i |s_i - t_i|^p, \quad p \in \{1, 2\}

    Args:
        student: Features already adapted to the teacher's shape, (B, ...).
        teacher: Features, the same shape; detach them.
        power: 1 (absolute) or 2 (squared).

    Returns:
        Distance, shape (B,), averaged over all n elements of a sample.

    Raises:
        ValueError: If shapes differ or ``power`` is neither 1 nor 2.

    Source:
        Romero et al. (FitNets), https://arxiv.org/abs/1412.6550, equation 3. Differs from the
        paper: mean over elements instead of half the sum, as in RepDistiller.
    """
    check_same_shape(student, teacher, "features")
    if power not in (1, 2):
        raise ValueError(f"Expected power 1 or 2, got {power}.")
    difference = (student - teacher).flatten(1)
    return (difference.abs() if power == 1 else difference.square()).mean(1)


def unit_length(values: Tensor, dim: int = 1, floor: float = 1e-4) -> Tensor:
    """Scale vectors along ``dim`` to unit length; those shorter than ``floor`` by its inverse.

    The floor bounds the gradient: at torch's own, 1e-12, a row of zeros (all units of a layer off)
    has one of 1e12, which ends a training.
    """
    return F.normalize(values, dim=dim, eps=floor)


@full_precision
def attention_map(features: Tensor) -> Tensor:
    r"""Where a network looks: channel mean of squared activations, L2-normalised per sample.

    Args:
        features: Shape (B, C, H, W).

    Returns:
        Map of unit length, shape (B, H * W); all zero where the features are.

    Raises:
        ValueError: If ``features`` is not four-dimensional.

    Source:
        Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, equation 2 and section 3.1.
    """
    if features.dim() != 4:
        raise ValueError(
            f"Expected feature maps of shape (B, C, H, W), got {tuple(features.shape)}: "
            f"choose a convolutional layer for attention transfer."
        )
    return unit_length(features.square().mean(1).flatten(1), floor=1e-6)


@full_precision
def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between two attention maps, per sample.

    Widths may differ. The larger map is average-pooled to the smaller one's size first.

    Args:
        student: Features, shape (B, C_s, H_s, W_s).
        teacher: Features, shape (B, C_t, H_t, W_t); detach them.

    Returns:
        Distance, shape (B,), averaged over positions.

    Source:
        Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, equation 2. Differs from the
        paper: mean of squares as in the authors' code instead of half the norm.
    """
    student, teacher = same_resolution(student, teacher)
    return (attention_map(student) - attention_map(teacher)).square().mean(1)


@full_precision
def unit_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""L1 distance between two feature tensors of unit length, per sample.

    .. math:: \Big\| \frac{s}{\|s\|_2} - \frac{t}{\|t\|_2} \Big\|_1

    Args:
        student: Features already adapted to the teacher's shape, (B, ...).
        teacher: Features, the same shape; detach them.

    Returns:
        Distance, shape (B,), summed over all elements of a sample: for unit vectors with many
        elements a mean would all but vanish.

    Raises:
        ValueError: If shapes differ.

    Source:
        Park & Kwak 2019 (FEED), https://arxiv.org/abs/1909.10754, equation 1.
    """
    check_same_shape(student, teacher, "features")
    units = unit_length(student.flatten(1)) - unit_length(teacher.flatten(1))
    return units.abs().sum(1)


@full_precision
def selectivity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy between the two sets of channels, per sample.

    .. math:: \frac{1}{C_S^2} \sum (s_i^\top s_j)^2 + \frac{1}{C_T^2} \sum (t_i^\top t_j)^2
        - \frac{2}{C_S C_T} \sum (s_i^\top t_j)^2

    with each channel's map scaled to unit length. Widths may differ; the larger map is
    average-pooled to the smaller one's size first.

    Args:
        student: Features, shape (B, C_s, H_s, W_s).
        teacher: Features, shape (B, C_t, H_t, W_t); detach them.

    Returns:
        Discrepancy, shape (B,).

    Raises:
        ValueError: If features are not maps.

    Source:
        Huang & Wang 2017 (NST), https://arxiv.org/abs/1707.01219, equation 7 with the polynomial
        kernel of degree 2.
    """
    student, teacher = same_resolution(student, teacher)
    s, t = unit_length(student.flatten(2), 2), unit_length(teacher.flatten(2), 2)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT).square().mean((1, 2))

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def same_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two feature maps (B, C, H, W) to the smaller height and width of both.

    Raises:
        ValueError: If one is not a feature map.
    """
    for features in (student, teacher):
        if features.dim() != 4:
            raise ValueError(
                f"Expected feature maps of shape (B, C, H, W), got {tuple(features.shape)}: "
                f"choose convolutional layers."
            )
    if student.shape[2:] != teacher.shape[2:]:
        (h, w), (u, v) = student.shape[2:], teacher.shape[2:]
        size = (min(h, u), min(w, v))
        student = F.adaptive_avg_pool2d(student, size)
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return student, teacher


def global_average_pool(features: Tensor) -> Tensor:
    """Mean over positions: maps (B, C, H, W, ...) and sequences (B, N, C) become (B, C)."""
    if features.dim() > 3:
        return features.mean((2, 3)) if features.dim() == 4 else features.flatten(2).mean(2)
    return features.mean(1) if features.dim() == 3 else features
