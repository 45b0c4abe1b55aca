"""Divergences between distributions, per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.precision import full_precision
from lightning_kd.utils.checks import check_positive, check_same_shape


def _per_sample(values: Tensor) -> Tensor:
    """Average everything after the batch axis (the positions of dense outputs), shape (B,)."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities, summed over dim 1; terms where p is 0 are 0."""
    log_ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)  # 0 log 0 is 0, not NaN
    return (log_p.exp() * log_ratio).sum(1)


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
    computed from log-probabilities, so it is finite where the usual ``log(1 - p)`` is not. No
    :math:`\tau^2` is applied.

    Args:
        student: Logits, shape (B, K).
        teacher: Logits, shape (B, K); detach them.
        target: Labels, shape (B,); -1 (unlabelled) is replaced by the teacher's likeliest class.
        temperature: Softening of student and teacher, > 0.
        target_weight: Alpha, multiplier of the target-class term.
        other_weight: Beta, multiplier of the other-classes term.

    Returns:
        Divergence in nats, shape (B,).

    Raises:
        ValueError: If shapes differ or the temperature is not positive.

    Source:
        Zhao et al. 2022 (DKD), https://arxiv.org/abs/2203.08679, equation 7.
    """
    check_same_shape(student, teacher, "logits")
    check_positive(temperature, "temperature")
    if student.shape[1] < 2:
        raise ValueError("Expected logits of at least two classes to decouple, got one.")
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
def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of two distributions in nats, in [0, log 2].

    Args:
        p: Probabilities, shape (D,).
        q: Probabilities, shape (D,).

    Source:
        Lin 1991; Ruder et al. 2017, https://arxiv.org/abs/1702.02052, section 3.2.
    """
    mean = (p + q) / 2

    def against_mean(r: Tensor) -> Tensor:
        return (r * (r.clamp(min=1e-30).log() - mean.clamp(min=1e-30).log())).sum(-1)

    return (against_mean(p) + against_mean(q)) / 2


@full_precision
def jensen_shannon_of_logits(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence of softened outputs (B, K), per sample (B,), in [0, log 2].

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, adaptive term.
    """
    check_same_shape(student, teacher, "logits")
    return jensen_shannon((student / temperature).softmax(1), (teacher / temperature).softmax(1))


@full_precision
def renyi(p: Tensor, q: Tensor, alpha: float = 0.99) -> Tensor:
    r"""Renyi divergence of order alpha in nats.

    .. math:: \frac{1}{\alpha - 1} \log \sum_i p_i^\alpha q_i^{1 - \alpha}

    Args:
        p: Probabilities, shape (D,).
        q: Probabilities, shape (D,).
        alpha: Order, > 0 and not 1.

    Source:
        Renyi 1961; Ruder et al. 2017, https://arxiv.org/abs/1702.02052, section 3.2.
    """
    return (p.pow(alpha) * q.pow(1 - alpha)).sum().log() / (alpha - 1)


@full_precision
def maximum_mean_discrepancy(source: Tensor, target: Tensor) -> Tensor:
    r"""Squared distance between two samples' mean embeddings under a Gaussian kernel.

    .. math:: \overline{k(s, s')} + \overline{k(t, t')} - 2\, \overline{k(s, t)}

    Args:
        source: Features, shape (N, D).
        target: Features, shape (M, D).

    Returns:
        A scalar >= 0. The kernel's squared width is the median squared distance of all pairs.

    Source:
        Gretton et al. 2012, "A Kernel Two-Sample Test", equation 5 (biased, hence never negative).
    """
    both = torch.cat([source, target])
    squared = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    n = len(source)
    kernel = torch.exp(-squared / squared.median().clamp(min=1e-30))
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
