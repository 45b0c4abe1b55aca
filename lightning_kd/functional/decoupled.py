from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.checks import check_positive, check_same_shape
from lightning_kd.functional.divergence import divergence
from lightning_kd.functional.precision import full_precision


@full_precision
def decoupled_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    r"""KL divergence split into the target class against the rest, and the rest among themselves.

    .. math:: \alpha\, KL(b^T \| b^S) + \beta\, KL(\hat p^T \| \hat p^S)

    with :math:`b = (p_y, 1 - p_y)` and :math:`\hat p` the softmax without class y. All of it is
    computed from log-probabilities, so that it is finite where ``log(1 - p)`` of the usual code is
    not. No :math:`\tau^2` is applied.

    Args:
        student: Logits, shape (B, K).
        teacher: Logits, shape (B, K); detach them.
        target: Labels, shape (B,); where -1 (unlabelled), the teacher's most likely class.
        temperature: Softening of both sides, > 0.
        target_weight: Alpha, of the target-class term.
        other_weight: Beta, of the other-classes term.

    Returns:
        Divergence in nats, shape (B,).

    Raises:
        ValueError: If shapes differ or the temperature is not positive.

    Source:
        Zhao et al. 2022 (DKD), https://arxiv.org/abs/2203.08679, equation 7.
    """
    check_same_shape(student, teacher, "logits")
    check_positive(temperature, "temperature")
    chosen = torch.where(target < 0, teacher.argmax(1), target)[:, None]
    away = torch.zeros_like(student, dtype=torch.bool).scatter_(1, chosen, True)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        rest = scaled.masked_fill(away, -torch.inf)
        pair = torch.stack([scaled.gather(1, chosen)[:, 0], torch.logsumexp(rest, 1)], 1)
        return F.log_softmax(pair, 1), F.log_softmax(rest, 1)

    (pair_s, rest_s), (pair_t, rest_t) = parts(student), parts(teacher)
    of_target, of_others = divergence(pair_s, pair_t), divergence(rest_s, rest_t)
    return target_weight * of_target + other_weight * of_others


@full_precision
def standardize(logits: Tensor) -> Tensor:
    r"""Z-score of each sample's logits: mean 0, standard deviation 1 over the classes.

    Args:
        logits: Shape (B, K, ...), K >= 2.

    Returns:
        Shape (B, K, ...); the deviation is the unbiased one, as published, but at least 0.001: of
        logits that are all alike it is 0, and the gradient would be without bounds.

    Source:
        Sun et al. 2024, https://arxiv.org/abs/2403.01427, algorithm 1.
    """
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
    return centred / (variance.clamp(min=1e-6).sqrt() + 1e-7)
