"""How far each of several teachers deserves trust, from what they say: weights that sum to 1."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.divergence import labelled, task_cross_entropy
from lightning_kd.functional.precision import full_precision

# the exact solution looks at 3^M faces of the polytope of weights
MOST_GRADIENTS = 8


@full_precision
def teacher_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each teacher with the labels, shape (M, B), 0 where the label is -1.

    Args:
        logits: Shape (M, B, K, ...).
        target: Labels, shape (B, ...).
    """
    m, b = logits.shape[:2]
    repeated = target.expand(m, *target.shape).flatten(0, 1)
    return task_cross_entropy(logits.flatten(0, 1), repeated).view(m, b)


@full_precision
def entropies(logits: Tensor) -> Tensor:
    """Entropy of each teacher's answer in nats, shape (M, B), for logits (M, B, K, ...)."""
    log_p = F.log_softmax(logits, dim=2)
    values = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(2)
    return values.flatten(2).mean(2) if values.dim() > 2 else values


def _complement(shares: Tensor) -> Tensor:
    """(1 - share) / (M - 1): trust from shares of blame that sum to 1 over M; 1 for M = 1."""
    m = len(shares)
    return torch.ones_like(shares) if m == 1 else (1 - shares) / (m - 1)


@full_precision
def confidence_weights(logits: Tensor, target: Tensor) -> Tensor:
    r"""Trust by cross-entropy with the labels, per sample.

    .. math:: w_m = \frac{1}{M - 1} \Big(1 - \frac{e^{CE_m}}{\sum_j e^{CE_j}}\Big)

    Args:
        logits: Shape (M, B, K).
        target: Labels, shape (B,); where -1, the weights are those of ``entropy_weights``.

    Returns:
        Shape (M, B), summing to 1 over M.

    Source:
        Zhang et al. 2022 (CA-MKD), https://arxiv.org/abs/2201.00007, equation 1. Differs from the
        authors' code: they divide by M once more.
    """
    # a teacher that rules the right class out has an infinite loss: it gets nothing, not NaN
    trust = _complement(teacher_losses(logits, target).clamp(max=1e4).softmax(0))
    return torch.where(labelled(target), trust, entropy_weights(logits))


@full_precision
def entropy_weights(logits: Tensor) -> Tensor:
    r"""Trust by how sure each teacher is, per sample; needs no labels.

    .. math:: w_m = \frac{1}{M - 1} \Big(1 - \frac{H_m}{\sum_j H_j}\Big)

    Args:
        logits: Shape (M, B, K).

    Returns:
        Shape (M, B), summing to 1 over M; equal where nobody is in doubt.

    Source:
        Kwon et al. 2020 (EBKD), "Adaptive knowledge distillation based on entropy", ICASSP, as in
        CA-MKD's comparison. Differs from that code: scaled to sum to 1 instead of M - 1.
    """
    doubt = entropies(logits)
    total = doubt.sum(0)
    sure = total < 1e-30  # all of them, and then all alike
    shares = torch.where(sure, 1 / len(doubt), doubt / total.masked_fill(sure, 1.0))
    return _complement(shares)


@full_precision
def lowest_loss_weights(logits: Tensor, target: Tensor | None) -> Tensor:
    """1 for the one teacher that is best on a sample, 0 for the others.

    Best is the lowest cross-entropy with the label, the lowest entropy where there is none.

    Args:
        logits: Shape (M, B, K).
        target: Labels, shape (B,), -1 where unlabelled, or None.

    Returns:
        Shape (M, B).

    Source:
        Shen et al. 2019, "Customizing Student Networks", ICCV (lowest entropy); Guo et al. 2020
        (KDCL, lowest loss).
    """
    doubt = entropies(logits)
    if target is not None:
        doubt = torch.where(labelled(target), teacher_losses(logits, target), doubt)
    return F.one_hot(doubt.argmin(0), len(logits)).T.to(doubt.dtype)


@functools.lru_cache(maxsize=MOST_GRADIENTS)
def _faces(m: int) -> Tensor:
    """Each weight 0, 1 (times C) or -1 (free), one free at least; shape (faces, M)."""
    states = [s for s in itertools.product((0.0, 1.0, -1.0), repeat=m) if -1.0 in s]
    return torch.tensor(states, dtype=torch.float64)


@full_precision
def min_norm_weights(gradients: Tensor, c_max: float = 1.0) -> Tensor:
    r"""Convex combination of gradients of the least length, no weight above ``c_max``.

    .. math:: \arg\min_a \frac12 \Big\| \sum_m a_m g_m \Big\|^2, \quad \sum_m a_m = 1, \quad
        0 \le a_m \le C

    Solved exactly: every face of the polytope (each weight 0, C or free) has one stationary point,
    and all 3^M small systems are solved in one batched call, without waiting for the device.

    Args:
        gradients: One gradient a row, shape (M, D), M at most 8.
        c_max: C, in [1 / M, 1]; 1 gives the min-norm point of multi-objective descent, 1 / M equal
            weights.

    Returns:
        Shape (M,), summing to 1.

    Raises:
        ValueError: If M > 8 or C is out of range.

    Source:
        Du et al. 2020 (AEKD), "Agree to Disagree", NeurIPS, equation 7.
    """
    m = len(gradients)
    if m > MOST_GRADIENTS:
        raise ValueError(
            f"Expected at most {MOST_GRADIENTS} gradients to be weighed, got {m}: use another "
            f"weighting for so many teachers."
        )
    if not 1 / m - 1e-9 <= c_max <= 1:
        raise ValueError(f"Expected c_max from 1 / M = {1 / m:.3g} to 1, got {c_max}.")
    if m == 1:
        return gradients.new_ones(1)
    g = gradients.double()
    gram = g @ g.T
    # equal gradients leave the weights undetermined: then the smallest weights are taken
    scale = gram.diagonal().mean().clamp(min=1e-30)
    gram = gram / scale + 1e-9 * torch.eye(m, dtype=g.dtype, device=g.device)
    fixed = _faces(m).to(g.device, non_blocking=True)
    free = fixed < 0
    # rows of free weights: (G a)_m = nu; of the others: a_m = 0 or C; the last row: they sum to 1
    system = g.new_zeros(len(fixed), m + 1, m + 1)
    system[:, :m, :m] = torch.where(
        free[:, :, None], gram, torch.eye(m, dtype=g.dtype, device=g.device)
    )
    system[:, :m, m] = -free.to(g.dtype)
    system[:, m, :m] = 1.0
    right = g.new_zeros(len(fixed), m + 1)
    right[:, :m] = torch.where(free, 0.0, fixed * c_max)
    right[:, m] = 1.0
    solved, _ = torch.linalg.solve_ex(system, right)
    weights = solved[:, :m]
    inside = ((weights > -1e-9) & (weights < c_max + 1e-9)).all(1)
    lengths = (weights @ gram * weights).sum(1)
    best = weights[torch.where(inside, lengths, torch.inf).argmin()].clamp(0.0, c_max)
    chosen: Tensor = (best / best.sum()).to(gradients.dtype)
    return chosen


@full_precision
def simplex_projection(values: Tensor) -> Tensor:
    """Nearest point, shape (M,), with entries >= 0 that sum to 1.

    Source:
        Duchi et al. 2008, "Efficient projections onto the l1-ball", figure 1.
    """
    ordered = values.sort(descending=True).values
    count = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    thresholds = (ordered.cumsum(0) - 1) / count
    last = ((ordered > thresholds).sum() - 1).clamp(min=0)  # of NaN nothing is greater
    projected: Tensor = (values - thresholds.gather(0, last[None])).clamp(min=0.0)
    return projected


@full_precision
def maximum_mean_discrepancy(source: Tensor, target: Tensor) -> Tensor:
    r"""Squared distance of two samples' mean embeddings under a Gaussian kernel.

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
