"""What is measured on validation and test data, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_kd.functional import labelled, task_cross_entropy
from lightning_kd.knowledge import Knowledge


def make_metrics(num_classes: int, num_teachers: int, stage: str) -> MetricCollection:
    """Loss, accuracy and calibration of the student; with teachers, theirs and the agreement."""

    def accuracy() -> MulticlassAccuracy:
        return MulticlassAccuracy(
            num_classes, average="micro", ignore_index=-1, validate_args=False
        )

    metrics: dict[str, Any] = {
        "loss": MeanMetric(nan_strategy="disable"),
        "accuracy": accuracy(),
        "ece": MulticlassCalibrationError(
            num_classes, n_bins=15, ignore_index=-1, validate_args=False
        ),
    }
    if num_teachers:
        metrics["agreement"] = accuracy()
        metrics["ensemble/accuracy"] = accuracy()
        metrics |= {f"teacher_{index}/accuracy": accuracy() for index in range(num_teachers)}
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
