"""Formulas of data-free distillation: what images are wanted, and which are looked at again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_kd.functional.checks import check_same_shape
from lightning_kd.functional.precision import full_precision
from lightning_kd.functional.trust import jensen_shannon


@full_precision
def modulating_weights(
    logits: Tensor, class_share: Tensor, gamma: float = 1.0, diversity_norm: bool = False
) -> Tensor:
    r"""How much an image is wanted: of a rare class, and one that the teacher finds hard.

    .. math:: \phi(x) = \Big(1 - \frac{1}{|B|} \sum_{x' \in B} [c(x') = c(x)]\Big) (1 - p(x))^\gamma

    Args:
        logits: Of the teacher, shape (B, K).
        class_share: Share of each class in the memory, shape (K,); all 0 where it is empty.
        gamma: Strength of the difficulty, >= 0.
        diversity_norm: Multiply by K / (K - 1), so that the first factor is 1, not 1 - 1 / K, where
            classes are balanced.

    Returns:
        Weights, shape (B,), in [0, 1], or with ``diversity_norm`` up to K / (K - 1); their gradient
        is finite where the teacher is certain.

    Source:
        Liu et al. 2024 (SSD-KD), https://arxiv.org/abs/2403.19539, equation 3.

    Example:
        >>> modulating_weights(torch.zeros(1, 2), torch.tensor([1.0, 0.0]))
        tensor([0.])
    """
    confidence, classes = logits.softmax(1).max(1)
    rare = 1 - class_share[classes]
    if diversity_norm:
        rare = rare * (logits.shape[1] / (logits.shape[1] - 1))
    return rare * (1 - confidence).clamp(min=1e-6) ** gamma


def priority_probabilities(priorities: Tensor, alpha: float, epsilon: float = 1e-6) -> Tensor:
    r"""Probability of each image to be drawn, :math:`P_i \propto (|\delta_i| + \epsilon)^\alpha`.

    Args:
        priorities: Shape (N,).
        alpha: 0 draws uniformly.
        epsilon: Keeps images of priority 0 in the game, > 0.

    Returns:
        Shape (N,), summing to 1.

    Source:
        Schaul et al. 2016, https://arxiv.org/abs/1511.05952, equation 1; SSD-KD, equation 6.
    """
    scaled = (priorities.abs() + epsilon) ** alpha
    return scaled / scaled.sum()


def importance_weights(
    probabilities: Tensor, count: int, beta: float, normalize: str = "mean"
) -> Tensor:
    r"""Weights that undo part of the bias of drawing by priority, :math:`w_i = (N P_i)^{-\beta}`.

    Args:
        probabilities: Of the drawn images, shape (B,).
        count: Number N of images that were drawn from.
        beta: 0: no correction; 1: the expected gradient is that of uniform draws.
        normalize: ``"mean"``: mean 1 in the batch; ``"max"``: largest 1 (which lowers the learning
            rate); ``"none"``: as in the paper.

    Returns:
        Weights, shape (B,).

    Source:
        Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.4; SSD-KD, equation 5.
    """
    if normalize not in ("mean", "max", "none"):
        raise ValueError(f'Expected normalize "mean", "max" or "none", got {normalize!r}.')
    weights = (count * probabilities) ** -beta
    if normalize == "mean":
        return weights / weights.mean()
    return weights / weights.max() if normalize == "max" else weights


def channel_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all but the channels, of values (B, C, ...), each (C,).

    As ``torch.var_mean``, three times as fast with its gradient on a CPU; differentiable once.
    Half precision is taken as float32.
    """
    with torch.autocast(values.device.type, enabled=False):
        wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        found: tuple[Tensor, Tensor] = _ChannelStatistics.apply(wide)
        return found


class _ChannelStatistics(torch.autograd.Function):
    """Autograd would walk over the values five times on the way back; once is enough."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(values.dim()) if d != 1]
        mean = values.mean(dims, keepdim=True)
        variance = (values - mean).square_().mean(dims)
        ctx.save_for_backward(values, mean)
        return mean.flatten(), variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        values, mean = ctx.saved_tensors
        count = values.numel() // mean.numel()
        slope = (2 / count) * of_variance.view_as(mean)
        return torch.addcmul(of_mean.view_as(mean) / count - slope * mean, slope, values)


def statistics_gap(found: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    r"""How far statistics of images are from those that BatchNorm layers remember.

    .. math:: \sum_l \|\mu_l - \hat\mu_l\|_2 + \|\sigma^2_l - \hat\sigma^2_l\|_2

    Args:
        found: Of each layer: mean, variance, remembered mean and variance, each of shape (C,).

    Returns:
        A scalar; its gradient is 0, not NaN, where nothing differs.

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, equation 4; SSD-KD,
        equation 1.
    """
    gaps = []
    for mean, variance, wanted_mean, wanted_variance in found:
        gaps.append(torch.linalg.vector_norm(mean - wanted_mean))
        gaps.append(torch.linalg.vector_norm(variance - wanted_variance))
    return torch.stack(gaps).sum()


@full_precision
def class_balance(logits: Tensor) -> Tensor:
    """Negative entropy of the batch's mean answer, in nats: least where classes are balanced.

    Args:
        logits: Shape (B, K).

    Returns:
        A scalar from -log K to 0.

    Source:
        Chen et al. 2019 (DAFL), https://arxiv.org/abs/1904.01186, equation 6.
    """
    mean = logits.softmax(1).mean(0)
    balance: Tensor = (mean * mean.clamp(min=1e-30).log()).sum()
    return balance


@full_precision
def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down and across, of images (B, C, H, W).

    Source:
        Mahendran & Vedaldi 2015, https://arxiv.org/abs/1412.0035, section 3. Differs from
        DeepInversion: mean absolute, not the norm of the whole batch.
    """
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean()
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean()
    return down + across


@full_precision
def logit_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of logits (B, K), per sample (B,).

    Source:
        Fang et al. 2019 (DFAD), https://arxiv.org/abs/1912.11006, equation 3.
    """
    check_same_shape(student, teacher, "logits")
    return (student - teacher).abs().flatten(1).mean(1)


@full_precision
def soft_cross_entropy(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of softened logits with labels (B,) or probabilities (B, K), per sample."""
    return F.cross_entropy(logits / temperature, target, reduction="none")


@full_precision
def jensen_shannon_of_logits(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence of softened answers (B, K), per sample (B,), in [0, log 2].

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, adaptive term.
    """
    check_same_shape(student, teacher, "logits")
    return jensen_shannon((student / temperature).softmax(1), (teacher / temperature).softmax(1))


@full_precision
def info_nce(anchors: Tensor, others: Tensor, temperature: float = 0.1) -> Tensor:
    r"""How badly each anchor is told from those that are not its own, by cosine similarity.

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
    alike = F.normalize(anchors, dim=1) @ F.normalize(others, dim=1).T / temperature
    own = torch.arange(len(anchors), device=anchors.device)
    return F.cross_entropy(alike, own, reduction="none")
