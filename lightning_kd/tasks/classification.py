from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_kd.functional import hard_labels, is_labelled, task_cross_entropy
from lightning_kd.outputs import NetworkOutput
from lightning_kd.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class Classification(Task):
    """Which one of K classes is it? Cross-entropy, accuracy, calibration.

    Args:
        label_smoothing: Probability mass spread over all classes, in [0, 1); for training alone.

    Raises:
        ValueError: If ``label_smoothing`` is out of range.

    Example:
        >>> import torch
        >>> from lightning_kd.outputs import NetworkOutput
        >>> Classification().predict(NetworkOutput(torch.zeros(1, 4)))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    watched = "accuracy"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected label_smoothing in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        self._looked = False

    def loss(self, output: NetworkOutput, target: Tensor) -> Tensor:
        """Cross-entropy of each sample, shape (B,), 0 where it has no label."""
        if target.is_floating_point():
            self._check_soft(target)
        return task_cross_entropy(output.logits, target, self.label_smoothing)

    def _check_soft(self, target: Tensor) -> None:
        # on a GPU a look waits for the device: once
        if self._looked and target.device.type != "cpu":
            return
        self._looked = True
        sums = target.sum(1)
        if not bool(((sums - 1).abs() < 0.01).all()):
            raise ValueError(
                f"Expected soft labels that sum to 1 over the classes, got sums from "
                f"{float(sums.min()):.3g} to {float(sums.max()):.3g}: several labels an image are "
                f"no Classification, whose classes exclude each other, but a MultiLabel task."
            )

    def class_logits(self, output: NetworkOutput) -> Tensor:
        """The logits themselves."""
        return output.logits

    def hard_target(self, target: Tensor | None) -> Tensor | None:
        """Labels as they are, of soft labels (B, K, ...) the likeliest; None stays None."""
        return hard_labels(target)

    def check(
        self,
        students: Mapping[str, NetworkOutput],
        teachers: Sequence[NetworkOutput] = (),
        num_classes: int | None = None,
    ) -> None:
        """Raise ``ValueError`` unless data and all networks have the same number of classes."""
        named = {f"teacher {m}": teacher for m, teacher in enumerate(teachers)}
        counts = {name: output.logits.shape[1] for name, output in {**students, **named}.items()}
        first, own = next(iter(counts.items()))
        if own < 2:
            raise ValueError(
                f"Expected {first} to have two or more outputs, one for each class, got {own}: "
                f"with a single one every loss is 0. For two classes set num_classes to 2."
            )
        if num_classes is not None and own != num_classes:
            raise ValueError(
                f"Expected {first} to have {num_classes} classes, as the data has, got {own}: set "
                f"its num_classes to {num_classes}."
            )
        for name, count in counts.items():
            if count != own:
                raise ValueError(
                    f"Expected {name} and {first} to have the same classes, got {count} and {own}: "
                    f"set num_classes; a teacher of some classes is wrapped, "
                    f"lightning_kd.Teacher(network, classes=[...])."
                )

    def metrics(self, output: NetworkOutput) -> dict[str, Metric]:
        """``loss`` (without label smoothing), ``accuracy`` and ``ece``."""
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassCalibrationError

        error = MulticlassCalibrationError(
            output.logits.shape[1], n_bins=15, ignore_index=-1, validate_args=False
        )
        return {
            "loss": MeanMetric(nan_strategy="disable"),
            "accuracy": self.agreement(output),
            "ece": error,
        }

    def update(self, metrics: Mapping[str, Metric], output: NetworkOutput, target: Tensor) -> None:
        """Add a batch with labels (B, ...), -1 where unlabelled."""
        if "loss" in metrics:
            # not as weights, which MeanMetric forgets without its search for NaN
            losses = task_cross_entropy(output.logits, target)
            metrics["loss"].update(losses[is_labelled(target)])
        for name in ("accuracy", "ece"):
            if name in metrics:
                metrics[name].update(output.logits, self.hard_target(target))

    def agreement(self, output: NetworkOutput) -> Metric:
        """Share of samples on which two networks choose the same class."""
        from torchmetrics.classification import MulticlassAccuracy

        classes = output.logits.shape[1]
        return MulticlassAccuracy(classes, average="micro", ignore_index=-1, validate_args=False)

    def update_agreement(
        self, metric: Metric, output: NetworkOutput, reference: NetworkOutput
    ) -> None:
        """Add a batch; the class that ``reference`` chooses takes the place of the label."""
        metric.update(output.logits, reference.logits.argmax(1))

    def predict(self, output: NetworkOutput) -> Tensor:
        """Probabilities, shape (B, K, ...)."""
        return output.logits.float().softmax(1)
