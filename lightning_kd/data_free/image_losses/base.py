from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.naming import keyed_by_name, snake_case

Statistics = list[tuple[Tensor, Tensor, Tensor, Tensor]]


class Unread:
    """Stands for an input that no image loss reads."""

    def __init__(self, name: str, flag: str) -> None:
        self._name, self._flag = name, flag

    def _complain(self, *_: Any) -> Any:
        raise RuntimeError(
            f"Expected an image loss that sets {self._flag} = True before it reads "
            f"inputs.{self._name}, got none: set it in the class."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._complain()

    __iter__ = __len__ = __getitem__ = __call__ = _complain


@dataclass(frozen=True)
class ImageLossInputs:
    """A batch of images, and what else image losses read.

    Args:
        images: In [0, 1], with gradient, shape (B, C, H, W).
        target: What the teacher is meant to predict: labels (B,) or probabilities (B, K).
        teacher: The teacher's output.
        student: The student's output; ``None`` unless a loss reads it.
        statistics: Of each BatchNorm layer of the teacher: mean and variance of its input, and
            its running ones, each of shape (C,); empty unless a loss reads them.
        class_share: Share of each class in the memory, shape (K,); ``None`` without a memory.
        description: Input of each BatchNorm layer of the teacher, averaged over each image,
            shape (B, D), D all their channels; ``None`` unless a loss reads it.
        describe: The same for other images (B, C, H, W), by running the teacher.
        random: Random numbers of this round.
    """

    images: Tensor
    target: Tensor
    teacher: NetworkOutput
    student: NetworkOutput | None
    statistics: Statistics
    class_share: Tensor | None
    description: Tensor | None = None
    describe: Callable[[Tensor], Tensor] = field(
        default_factory=lambda: Unread("describe", "reads_descriptions")
    )
    random: torch.Generator | None = None


class ImageLoss(nn.Module, ABC):
    """One criterion for images. Subclass it and implement ``forward``.

    Args:
        weight: Multiplier of this loss in the total.
    """

    #: whether the student is run on the images
    reads_student = False
    #: whether inputs of the teacher's BatchNorm layers are measured
    reads_statistics = False
    #: whether those inputs are averaged for each image
    reads_descriptions = False
    #: of Adam for the loss's own parameters
    learning_rate = 1e-3
    #: whether the loss is left out until the student starts to train
    waits = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def name(self) -> str:
        """Key in the log: the class name in snake case."""
        return snake_case(self)

    def teacher_layers(self) -> Sequence[str]:
        """Layers of the teacher whose outputs are read."""
        return ()

    def build(self, description: Tensor) -> None:
        """Size own parameters by the description of one image, (1, D); called once."""

    @abstractmethod
    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Unweighted scalar, to be minimised by the generator."""

    def after_round(self, images: Tensor, describe: Callable[[Tensor], Tensor]) -> None:
        """Called with the images of a round that are kept, (B, C, H, W)."""


def image_losses_by_name(
    losses: Mapping[str, ImageLoss] | Sequence[ImageLoss],
) -> dict[str, ImageLoss]:
    """Key each image loss by its name in the log: the user's, or its class's, numbered if repeated.

    Raises:
        TypeError: If ``losses`` is neither a list nor a mapping, or holds something else.
    """
    if not isinstance(losses, (list, tuple, Mapping)):
        raise TypeError(
            f"Expected image_losses as a list, or as a mapping of names, got "
            f"{type(losses).__name__}."
        )
    for loss in losses.values() if isinstance(losses, Mapping) else losses:
        if not isinstance(loss, ImageLoss):
            hint = f"{loss.__name__}, the class: add ()" if isinstance(loss, type) else ""
            raise TypeError(
                f"Expected image_losses of type ImageLoss, got {hint or type(loss).__name__}."
            )
    return dict(losses) if isinstance(losses, Mapping) else keyed_by_name(losses)
