"""Cross-entropy with labels that are hard, soft or missing, per sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.divergence import _per_sample
from lightning_kd.functional.precision import full_precision


def is_labelled(target: Tensor) -> Tensor:
    """Whether a sample has a label, shape (B,), for labels (B, ...) where -1 means none."""
    return (target >= 0).flatten(1).any(1) if target.dim() > 1 else target >= 0


def mean_over_positions(values: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled positions of a sample, shape (B,), of values (B, ...), 0 elsewhere."""
    if values.dim() == 1:
        return values
    known = (target >= 0).flatten(1).sum(1).clamp(min=1)
    return values.flatten(1).sum(1) / known


def hard_labels(target: Tensor | None) -> Tensor | None:
    """Labels (B, ...) as they are, soft labels (B, K, ...) by argmax; None stays None."""
    if target is None:
        return None
    return target.argmax(1) if target.is_floating_point() else target.long()


@full_precision
def task_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, per sample; 0 where the label is -1 (unlabelled).

    Args:
        logits: Shape (B, K, ...).
        target: Labels in [0, K), or -1 for "unlabelled", shape (B, ...), whole; or soft labels,
            probabilities of shape (B, K, ...), floating.
        label_smoothing: Probability mass spread over all classes, in [0, 1).

    Returns:
        Cross-entropy in nats, shape (B,); dense outputs are averaged over labelled positions.

    Raises:
        ValueError: If a label is out of range (on CPU; a GPU reports it asynchronously) or the
            shapes do not match.

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
    target = target.long()
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
    return mean_over_positions(loss, target)


@full_precision
def soft_cross_entropy(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of softened logits with labels (B,) or probabilities (B, K), per sample."""
    return F.cross_entropy(logits / temperature, target, reduction="none")
