from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.checks import check_same_shape
from lightning_kd.functional.precision import full_precision


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
        paper: mean over elements instead of half the sum, as RepDistiller does.
    """
    check_same_shape(student, teacher, "features")
    if power not in (1, 2):
        raise ValueError(f"Expected power 1 or 2, got {power}.")
    difference = (student - teacher).flatten(1)
    return (difference.abs() if power == 1 else difference.square()).mean(1)


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
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


@full_precision
def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two attention maps, per sample.

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
    if student.shape[2:] != teacher.shape[2:]:
        (h, w), (u, v) = student.shape[2:], teacher.shape[2:]
        size = (min(h, u), min(w, v))
        student = F.adaptive_avg_pool2d(student, size)
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return (attention_map(student) - attention_map(teacher)).square().mean(1)
