from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.outputs import NetworkOutput, TeacherOutputs

if TYPE_CHECKING:
    from torchmetrics import Metric


class Task(ABC):
    """What networks are trained for: the loss, what is measured, what is predicted.

    Subclass it for a task of your own and give it to a paradigm as ``task``.
    """

    #: name of the metric that is watched: checkpoints and reports follow ``val/<watched>``
    watched: str
    #: whether a larger value of it is better
    higher_is_better = True

    @abstractmethod
    def loss(self, output: NetworkOutput, target: Tensor) -> Tensor:
        """Loss of each sample against its label, shape (B,), 0 where it has none."""

    def mean_loss(self, output: NetworkOutput, target: Tensor) -> Tensor:
        """Loss averaged over the labelled samples (in training: of all processes), a scalar."""
        return mean_over_labelled(self.loss(output, target), target)

    @abstractmethod
    def class_logits(self, output: NetworkOutput) -> Tensor | None:
        """The answer as logits over classes, shape (B, K, ...); None: it has none."""

    def ensemble(self, outputs: TeacherOutputs) -> NetworkOutput:
        """The mean of several outputs: log-probabilities; without classes, the mean itself."""
        if self.class_logits(outputs.outputs[0]) is not None:
            return NetworkOutput(outputs.log_probabilities())
        stacked = torch.stack([output.logits for output in outputs.outputs])
        weights = outputs.weights.to(stacked)
        shape = (*weights.shape, *(1,) * (stacked.dim() - weights.dim()))
        return NetworkOutput((weights.view(shape) * stacked).sum(0))

    @abstractmethod
    def hard_target(self, target: Tensor | None) -> Tensor | None:
        """Labels as losses, weightings and exchanges read them: (B, ...), -1 where unlabelled."""

    @abstractmethod
    def check(
        self,
        students: Mapping[str, NetworkOutput],
        teachers: Sequence[NetworkOutput] = (),
        num_classes: int | None = None,
    ) -> None:
        """Look at the outputs of a dry run.

        Args:
            students: Outputs of those that learn, by what they are called.
            teachers: Output of each teacher.
            num_classes: Of the data, if it says so.

        Raises:
            ValueError: If networks and data do not fit together.
        """

    @abstractmethod
    def metrics(self, output: NetworkOutput) -> dict[str, Metric]:
        """New metrics of a network with outputs like this one; ``watched`` is among them."""

    @abstractmethod
    def update(self, metrics: Mapping[str, Metric], output: NetworkOutput, target: Tensor) -> None:
        """Add a labelled batch to ``metrics``, all or some of those that ``metrics`` makes."""

    @abstractmethod
    def agreement(self, output: NetworkOutput) -> Metric:
        """A new metric of how far two networks answer alike."""

    @abstractmethod
    def update_agreement(
        self, metric: Metric, output: NetworkOutput, reference: NetworkOutput
    ) -> None:
        """Add a batch; ``reference`` takes the place of the labels."""

    @abstractmethod
    def predict(self, output: NetworkOutput) -> Any:
        """What ``Trainer.predict`` returns."""
