"""What is measured on validation and test data, by torchmetrics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_kd.functional import labelled, task_cross_entropy
from lightning_kd.knowledge import Knowledge


def _accuracy(num_classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average="micro", ignore_index=-1, validate_args=False)


def make_metrics(num_classes: int, num_teachers: int, stage: str) -> MetricCollection:
    """Loss, accuracy and calibration of the student; with teachers, theirs and the agreement."""
    metrics: dict[str, Any] = {
        "loss": MeanMetric(nan_strategy="disable"),
        "accuracy": _accuracy(num_classes),
        "ece": MulticlassCalibrationError(
            num_classes, n_bins=15, ignore_index=-1, validate_args=False
        ),
    }
    if num_teachers:
        metrics["agreement"] = _accuracy(num_classes)
        metrics["ensemble/accuracy"] = _accuracy(num_classes)
        metrics |= {
            f"teacher_{index}/accuracy": _accuracy(num_classes) for index in range(num_teachers)
        }
    # each metric reads other tensors, so no two may share a state
    return MetricCollection(metrics, prefix=f"{stage}/", compute_groups=False)


def update_metrics(
    metrics: MetricCollection,
    logits: Tensor,
    target: Tensor | None,
    teachers: Sequence[Knowledge],
    ensemble: Tensor | None,
) -> None:
    """Add one batch.

    Args:
        metrics: Of ``make_metrics``.
        logits: The student's, shape (B, K).
        target: Labels (B,), -1 where unlabelled, or None: then only the agreement is measured.
        teachers: Knowledge of each teacher.
        ensemble: The teachers' mean answer, shape (B, K).
    """
    if ensemble is not None:
        metrics["agreement"].update(logits, ensemble.argmax(1))
    if target is None:
        return
    # not as weights, which MeanMetric forgets without its search for NaN
    metrics["loss"].update(task_cross_entropy(logits, target)[labelled(target)])
    metrics["accuracy"].update(logits, target)
    metrics["ece"].update(logits, target)
    if ensemble is not None:
        metrics["ensemble/accuracy"].update(ensemble, target)
    for index, teacher in enumerate(teachers):
        metrics[f"teacher_{index}/accuracy"].update(teacher.logits, target)


def make_cohort_metrics(num_classes: int, num_peers: int, stage: str) -> MetricCollection:
    """Accuracy of each peer and of the cohort, and the agreement of each pair of peers."""
    metrics: dict[str, Any] = {
        "loss": MeanMetric(nan_strategy="disable"),
        "ensemble/accuracy": _accuracy(num_classes),
        "ensemble/ece": MulticlassCalibrationError(
            num_classes, n_bins=15, ignore_index=-1, validate_args=False
        ),
    }
    metrics |= {f"peer_{k}/accuracy": _accuracy(num_classes) for k in range(num_peers)}
    metrics |= {
        f"agreement_{j}_{k}": _accuracy(num_classes)
        for j, k in itertools.combinations(range(num_peers), 2)
    }
    return MetricCollection(metrics, prefix=f"{stage}/", compute_groups=False)


def update_cohort_metrics(
    metrics: MetricCollection,
    peers: Sequence[Knowledge],
    answer: Tensor,
    target: Tensor | None,
) -> None:
    """Add one batch.

    Args:
        metrics: Of ``make_cohort_metrics``.
        peers: What each peer says.
        answer: The cohort's log-probabilities, shape (B, K); their cross-entropy is the loss.
        target: Labels (B,), -1 where unlabelled, or None: then only agreement is measured.
    """
    chosen = [peer.logits.argmax(1) for peer in peers]
    for j, k in itertools.combinations(range(len(peers)), 2):
        metrics[f"agreement_{j}_{k}"].update(chosen[j], chosen[k])
    if target is None:
        return
    metrics["loss"].update(task_cross_entropy(answer, target)[labelled(target)])
    metrics["ensemble/accuracy"].update(answer, target)
    metrics["ensemble/ece"].update(answer.exp(), target)
    for k, peer in enumerate(peers):
        metrics[f"peer_{k}/accuracy"].update(peer.logits, target)
