"""What every core provides: losses of a batch, what is trained, what is kept, what is measured."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput
from lightning_kd.tasks import Task
from lightning_kd.teachers import SubTeachers, TeacherEnsemble

if TYPE_CHECKING:
    from torchmetrics import Metric


class BaseDistillation(nn.Module, ABC):
    """What a paradigm trains; a LightningModule holds one, and so can a plain PyTorch loop."""

    task: Task
    task_weight: float
    teachers: TeacherEnsemble
    #: shape (C, H, W) of the images that ``build`` saw
    input_shape: tuple[int, ...] | None = None

    @property
    def built(self) -> bool:
        """Whether ``build`` was called."""
        return self.input_shape is not None

    @abstractmethod
    def build(self, x: Tensor, num_classes: int | None = None) -> None:
        """Size adapters and gates by a dry run; once, before the optimizer is made.

        Args:
            x: Images (B, C, H, W); one is enough.
            num_classes: Of the data, checked against the networks.

        Raises:
            ValueError: If a network cannot take these images, a layer does not exist, or the
                numbers of classes differ.
        """

    @abstractmethod
    def attach(self) -> None:
        """Find layers again where some were replaced, as SyncBatchNorm does."""

    @abstractmethod
    def losses_and_output(
        self, x: Tensor, target: Tensor | None
    ) -> tuple[dict[str, Tensor], NetworkOutput]:
        """Weighted losses of a batch by name, each a scalar, and the output; see ``forward``."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the loss of one batch.

        Args:
            x: Images, shape (B, C, H, W).
            target: Labels (B, ...), -1 where unlabelled, or soft labels (B, K, ...); None: none.

        Returns:
            ``loss`` (the sum), ``task`` and each distillation loss by its name (weighted, scalars),
            and ``output``, the logits that were trained.
        """
        if not self.built:
            before = sum(1 for _ in self.parameters())
            self.build(x[:1])
            if sum(1 for _ in self.parameters()) > before:
                warnings.warn(
                    "Adapters were made in the first forward pass: call build(images) before the "
                    "optimizer is made, or they are not trained.",
                    stacklevel=2,
                )
        losses, output = self.losses_and_output(x, target)
        return {"loss": total_loss(losses), **losses, "output": output.logits}

    def after_step(self) -> None:
        """Let parts that follow the students see them.

        Call it after each optimizer step of a loop of your own: exchanges whose teachers are
        snapshots or averages of the peers (``Codistillation``, ``PeerCollaborative``) need it.
        """

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseDistillation:
        """Find layers in the copy's own networks."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if twin.built:
            twin.attach()
        return twin

    # ------------------------------------------------------------------ what is kept and measured

    @abstractmethod
    def trainable_modules(self) -> list[nn.Module]:
        """Parts that the optimizer trains."""

    @abstractmethod
    def exported_networks(self) -> dict[str, nn.Module]:
        """Networks that are trained, each under the name of the file that it is exported to."""

    @abstractmethod
    def exported_state(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of one exported network, under its own names, from a state of this object."""

    @abstractmethod
    def exported_config(self, name: str, options: Mapping[str, Any]) -> Any:
        """Configuration of one exported network, from a paradigm's options; None: unknown."""

    def scores(self, logged: Mapping[str, Any]) -> list[float]:
        """The watched metric of each exported network; empty where there is only one."""
        return []

    def best_network(self, scores: Sequence[float]) -> str:
        """Name of the exported network to keep, given their ``scores``."""
        return next(iter(self.exported_networks()))

    @abstractmethod
    def output(self, x: Tensor) -> NetworkOutput:
        """The output for images (B, C, H, W) that is predicted and measured."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """New metrics of everything that is measured; call it after ``build``."""

    @abstractmethod
    def update_metrics(
        self, metrics: Mapping[str, Metric], x: Tensor, target: Tensor | None, observe: bool
    ) -> NetworkOutput:
        """Measure one batch; with ``observe``, parts that learn from validation see it."""

    @abstractmethod
    def after_validation(self) -> None:
        """Let a weighting or exchange learn from what a validation inside a fit showed."""

    #: whether ``calibrate`` is to be called before training
    wants_images = False

    def calibrate(self, images: Sequence[Tensor]) -> None:
        """Let a weighting look at batches of training images (B, C, H, W) once."""

    def random_parts(self) -> list[SubTeachers]:
        """Parts with a random seed of their own; a seed of None means that of the run."""
        parts = (getattr(self, "stochastic_depth", None), getattr(self.teachers, "source", None))
        return [part for part in parts if part is not None]

    def scalars(self) -> dict[str, Tensor]:
        """Additional scalars to log for the last batch, by name."""
        return {}

    def compilable_networks(self) -> list[nn.Module]:
        """Trained networks that ``torch.compile`` may compile, each by itself.

        Raises:
            ValueError: If they cannot be.
        """
        return list(self.exported_networks().values())


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of the losses of a step.

    Raises:
        ValueError: If there is none, or one is no scalar.
    """
    if not losses:
        raise ValueError(
            "Expected at least one loss, got none: the batch has no labels and there are no "
            "distillation losses (or task_weight is 0)."
        )
    wrong = [name for name, loss in losses.items() if name in ("loss", "output") or loss.dim()]
    if wrong:
        raise ValueError(
            f"Expected named losses, each a scalar, without their sum `loss` or an `output`, got "
            f"{wrong}: return what losses_and_output(x, target)[0] holds, and more by other names."
        )
    return torch.stack(list(losses.values())).sum()


def cut_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of a state whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
