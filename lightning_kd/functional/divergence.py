from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.checks import check_positive, check_same_shape, check_space
from lightning_kd.functional.precision import full_precision


def _per_sample(values: Tensor) -> Tensor:
    """Average everything behind the batch axis (the positions of dense outputs), shape (B,)."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def labelled(target: Tensor) -> Tensor:
    """Whether a sample has a label, shape (B,), for labels (B, ...) of which -1 is none."""
    return (target >= 0).flatten(1).any(1) if target.dim() > 1 else target >= 0


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities, summed over dim 1; where p is 0 nothing is added."""
    log_ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)  # 0 log 0 is 0, not NaN
    return (log_p.exp() * log_ratio).sum(1)


def hard(target: Tensor | None) -> Tensor | None:
    """Labels (B, ...) as they are, of soft labels (B, K, ...) the likeliest; None stays None."""
    return target.argmax(1) if target is not None and target.is_floating_point() else target


@full_precision
def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    r"""Kullback-Leibler divergence from teacher to student, summed over classes, per sample.

    .. math:: \sum_k p_k^T (\log p_k^T - \log p_k^S), \quad p = \mathrm{softmax}(z / \tau)

    No :math:`\tau^2` is applied. Log-probabilities are valid logits at temperature 1, so an
    already softened target may be passed as ``teacher``. Where a teacher's logit is minus infinity,
    that class adds nothing.

    Args:
        student: Logits, shape (B, K, ...), any float type.
        teacher: Logits, shape (B, K, ...); differentiated if it requires grad, so detach it.
        student_temperature: Softening of the student, > 0, no unit.
        teacher_temperature: Softening of the teacher, > 0, no unit.

    Returns:
        Divergence in nats, shape (B,), averaged over positions for dense outputs.

    Raises:
        ValueError: If shapes differ or a temperature is not positive.

    Source:
        Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2. Differs from the paper:
        two temperatures (Rusu et al. 2016 sharpen the teacher alone).

    Example:
        >>> z = torch.zeros(2, 3)
        >>> kl_divergence(z, z)
        tensor([0., 0.])
    """
    check_same_shape(student, teacher, "logits")
    check_positive(student_temperature, "student_temperature")
    check_positive(teacher_temperature, "teacher_temperature")
    log_q = F.log_softmax(student / student_temperature, dim=1)
    log_p = F.log_softmax(teacher / teacher_temperature, dim=1)
    return _per_sample(divergence(log_q, log_p))


@full_precision
def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of logits, per sample.

    .. math:: \frac{1}{K} \sum_k (z_k^S - z_k^T)^2

    Args:
        student: Logits, shape (B, K, ...).
        teacher: Logits, shape (B, K, ...); detach it.

    Returns:
        Squared difference, shape (B,), averaged over classes and positions.

    Raises:
        ValueError: If shapes differ.

    Source:
        Ba & Caruana 2014, https://arxiv.org/abs/1312.6184, equation 1. Differs from the paper: mean
        over classes instead of half the sum, so that the weight does not depend on K.

    Example:
        >>> logit_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([5.])
    """
    check_same_shape(student, teacher, "logits")
    return _per_sample((student - teacher).square().mean(1))


@full_precision
def task_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, per sample; 0 where the label is -1 (unlabelled).

    Args:
        logits: Shape (B, K, ...).
        target: Labels in [0, K), or -1 for "unlabelled", shape (B, ...), int64; or soft labels,
            probabilities of shape (B, K, ...), floating.
        label_smoothing: Probability mass spread over all classes, in [0, 1).

    Returns:
        Cross-entropy in nats, shape (B,); dense outputs are averaged over labelled positions.

    Raises:
        ValueError: If a label is out of range (on CPU; a GPU reports it asynchronously) or the
            shapes do not fit.

    Source:
        Standard; https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html.
    """
    if target.is_floating_point() and target.shape == logits.shape:
        return _per_sample(
            F.cross_entropy(
                logits, target.to(logits), reduction="none", label_smoothing=label_smoothing
            )
        )
    if target.is_floating_point():
        raise ValueError(
            f"Expected whole numbers as labels, or soft labels of shape {tuple(logits.shape)}, got "
            f"{target.dtype} of shape {tuple(target.shape)}."
        )
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"Expected labels of shape {tuple(logits.shape[:1] + logits.shape[2:])} for logits of "
            f"shape {tuple(logits.shape)}, got {tuple(target.shape)}."
        )
    try:
        loss = F.cross_entropy(
            logits, target, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
        )
    except IndexError as error:
        raise ValueError(
            f"Expected labels from 0 to {logits.shape[1] - 1}, or -1 for unlabelled, got "
            f"{int(target.min())} to {int(target.max())}. Check the network's num_classes and "
            f"the labels of the data."
        ) from error
    if loss.dim() == 1:
        return loss
    known = (target >= 0).flatten(1).sum(1).clamp(min=1)
    return loss.flatten(1).sum(1) / known


@full_precision
def combine(logits: Tensor, weights: Tensor, temperature: float, space: str) -> Tensor:
    r"""Log-probabilities of several teachers' weighted mean answer.

    In probability space :math:`\log \sum_m w_m\, \mathrm{softmax}(z_m / \tau)`, in logit space
    :math:`\log\,\mathrm{softmax}(\sum_m w_m z_m / \tau)` (the geometric mean, which needs teachers
    of comparable logit scale).

    Args:
        logits: Shape (M, B, K, ...), one row a teacher.
        weights: Shape (M,) or (M, B), each column a convex combination.
        temperature: Softening, > 0.
        space: ``"probability"`` or ``"logit"``.

    Returns:
        Log-probabilities, shape (B, K, ...); their exponentials sum to 1 over K.

    Raises:
        ValueError: If ``space`` is neither, or the temperature is not positive.

    Source:
        Hinton et al. 2015, section 2; You et al., KDD 2017. The student's gradient of KL to the
        probability mean equals that of the weighted mean of the KLs, so weighting lives here only.
    """
    check_positive(temperature, "temperature")
    check_space(space)
    shaped = weights.to(logits).reshape(*weights.shape, *(1,) * (logits.dim() - weights.dim()))
    if space == "logit":
        # who counts for nothing rules nothing out: 0 times minus infinity would be NaN
        weighted = torch.where(shaped > 0, shaped * logits, 0.0)
        return F.log_softmax(weighted.sum(0) / temperature, dim=1)
    return torch.logsumexp(F.log_softmax(logits / temperature, dim=2) + shaped.log(), dim=0)
