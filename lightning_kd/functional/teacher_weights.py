"""How much each of several teachers is trusted, and the mean of their outputs."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.cross_entropy import is_labelled, task_cross_entropy
from lightning_kd.functional.precision import full_precision, widest
from lightning_kd.utils.checks import check_positive, check_space

# the exact solution visits 3^M faces of the polytope of weights
MOST_GRADIENTS = 8


@full_precision
def combine_teachers(logits: Tensor, weights: Tensor, temperature: float, space: str) -> Tensor:
    r"""Log-probabilities of several teachers' weighted mean output.

    In probability space :math:`\log \sum_m w_m\, \mathrm{softmax}(z_m / \tau)`, in logit space
    :math:`\log\,\mathrm{softmax}(\sum_m w_m z_m / \tau)` (the geometric mean, which needs teachers
    of comparable logit scale).

    Args:
        logits: Shape (M, B, K, ...), one row per teacher.
        weights: Shape (M,) or (M, B), each column a convex combination.
        temperature: Softening, > 0.
        space: ``"probability"`` or ``"logit"``.

    Returns:
        Log-probabilities, shape (B, K, ...); their exponentials sum to 1 over K.

    Raises:
        ValueError: If ``space`` is neither, or the temperature is not positive.

    Source:
        Hinton et al. 2015, section 2; You et al., KDD 2017. The student's gradient of KL to the
        probability mean equals that of the weighted mean of the KLs, so weights belong here.
    """
    check_positive(temperature, "temperature")
    check_space(space)
    shaped = weights.to(logits).reshape(*weights.shape, *(1,) * (logits.dim() - weights.dim()))
    if space == "logit":
        # a teacher of weight 0 rules out no class: 0 times minus infinity would be NaN
        unknown = logits == -torch.inf
        weighted = shaped * logits.masked_fill(unknown, 0.0)
        weighted = weighted.masked_fill(unknown & (shaped > 0), -torch.inf)
        return F.log_softmax(weighted.sum(0) / temperature, dim=1)
    log_p = F.log_softmax(logits / temperature, dim=2)
    nothing = shaped == 0
    log_weights = shaped.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf)
    combined = torch.logsumexp(log_p + log_weights, dim=0)
    if (
        shaped.requires_grad
    ):  # the logarithm has no gradient at 0, where that of the mean is p_m / p
        slope = (log_p - combined).detach().exp().clamp(max=1e30)
        combined = combined + (shaped * slope.masked_fill(~nothing, 0.0)).sum(0)
    return combined


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
    """Entropy of each teacher's output in nats, shape (M, B), for logits (M, B, K, ...)."""
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
    # a teacher that rules out the right class has an infinite loss: its weight is 0, not NaN
    trust = _complement(teacher_losses(logits, target).clamp(max=1e4).softmax(0))
    return torch.where(is_labelled(target), trust, entropy_weights(logits))


@full_precision
def entropy_weights(logits: Tensor) -> Tensor:
    r"""Trust by how certain each teacher is, per sample; needs no labels.

    .. math:: w_m = \frac{1}{M - 1} \Big(1 - \frac{H_m}{\sum_j H_j}\Big)

    Args:
        logits: Shape (M, B, K).

    Returns:
        Shape (M, B), summing to 1 over M; equal where all teachers are certain.

    Source:
        Kwon et al. 2020 (EBKD), "Adaptive knowledge distillation based on entropy", ICASSP, as in
        CA-MKD's comparison. Differs from that code: scaled to sum to 1 instead of M - 1.
    """
    doubt = entropies(logits)
    total = doubt.sum(0)
    sure = total < 1e-30  # all of them: then weights are equal
    shares = torch.where(sure, 1 / len(doubt), doubt / total.masked_fill(sure, 1.0))
    return _complement(shares)


@full_precision
def lowest_loss_weights(logits: Tensor, target: Tensor | None) -> Tensor:
    """1 for the one teacher that is best on a sample, 0 for the others.

    Best means the lowest cross-entropy with the label, or the lowest entropy without one.

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
        doubt = torch.where(is_labelled(target), teacher_losses(logits, target), doubt)
    return F.one_hot(doubt.argmin(0), len(logits)).T.to(doubt.dtype)


@functools.lru_cache(maxsize=MOST_GRADIENTS)
def _faces(m: int) -> Tensor:
    """Each weight 0, 1 (times C) or -1 (free), one free at least; shape (faces, M)."""
    states = [s for s in itertools.product((0.0, 1.0, -1.0), repeat=m) if -1.0 in s]
    return torch.tensor(states, dtype=torch.float64)


@full_precision
def min_norm_weights(gradients: Tensor, c_max: float = 1.0) -> Tensor:
    r"""Convex combination of gradients with the least norm, no weight above ``c_max``.

    .. math:: \arg\min_a \frac12 \Big\| \sum_m a_m g_m \Big\|^2, \quad \sum_m a_m = 1, \quad
        0 \le a_m \le C

    Solved exactly: every face of the polytope (each weight 0, C or free) has one stationary point,
    and all 3^M small systems are solved in one batched call, without waiting for the device.

    Args:
        gradients: One gradient per row, shape (M, D), M at most 8.
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
            f"Expected at most {MOST_GRADIENTS} gradients to weight, got {m}: use another "
            f"weighting for that many teachers."
        )
    if not 1 / m - 1e-9 <= c_max <= 1:
        raise ValueError(f"Expected c_max from 1 / M = {1 / m:.3g} to 1, got {c_max}.")
    if m == 1:
        return gradients.new_ones(1)
    g = widest(gradients)
    gram = g @ g.T
    # equal gradients leave the weights undetermined: then the smallest weights are taken
    scale = gram.diagonal().mean().clamp(min=1e-30)
    gram = gram / scale + 1e-9 * torch.eye(m, dtype=g.dtype, device=g.device)
    fixed = _faces(m).to(g.device, g.dtype, non_blocking=True)
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
    last = ((ordered > thresholds).sum() - 1).clamp(min=0)  # comparisons with NaN are false
    projected: Tensor = (values - thresholds.gather(0, last[None])).clamp(min=0.0)
    return projected


@full_precision
def simplex_cross_entropy_weights(logits: Tensor, target: Tensor, steps: int = 60) -> Tensor:
    r"""Weights of the mixture of logits with the lowest cross-entropy on the batch.

    .. math:: \arg\min_a CE(\sum_k a_k z_k, y), \quad a_k \ge 0, \quad \sum_k a_k = 1

    The problem is convex; it is solved by exponentiated gradient with a fixed number of steps, on
    the device.

    Args:
        logits: Shape (K, B, C).
        target: Labels, shape (B,), -1 where unlabelled.
        steps: Steps of the solver.

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


@full_precision
def min_logits(logits: Tensor, target: Tensor) -> Tensor:
    r"""Least logit of each class relative to the true class's.

    .. math:: z_j = \min_k (z_{k,j} - z_{k,y})

    Its cross-entropy is never above that of the best peer, on any sample.

    Args:
        logits: Shape (K, B, C), one row per peer.
        target: Labels, shape (B,); where -1, values are meaningless.

    Returns:
        Logits, shape (B, C), 0 at the true class.

    Source:
        Guo et al. 2020 (KDCL), equation 7.
    """
    right = target.clamp(min=0)[None, :, None].expand(len(logits), -1, 1)
    return (logits - logits.gather(2, right)).amin(0)
