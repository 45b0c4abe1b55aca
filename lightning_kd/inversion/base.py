from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge

Statistics = list[tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Inverted:
    """A batch of images in the making.

    Args:
        images: In [0, 1], with gradient, shape (B, C, H, W).
        target: What the teacher is to see in them: labels (B,) or probabilities (B, K).
        teacher: What it sees.
        student: What the student sees; None unless somebody reads it.
        statistics: Of each BatchNorm layer of the teacher: mean and variance of its input, and
            those it remembers, each of shape (C,); empty unless somebody reads them.
        class_share: Share of each class in the memory, shape (K,); None without a memory.
    """

    images: Tensor
    target: Tensor
    teacher: Knowledge
    student: Knowledge | None
    statistics: Statistics
    class_share: Tensor | None


class InversionTerm(nn.Module, ABC):
    """One wish of what images should be like. Subclass it and give ``forward``.

    Args:
        weight: Multiplier of this term in the loss of the image source.
    """

    #: whether the student is asked about the images
    reads_student = False
    #: whether inputs of the teacher's BatchNorm layers are measured
    reads_statistics = False
    #: whether the term waits until the student has begun to learn
    waits = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def name(self) -> str:
        """Key in the log: the class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def teacher_layers(self) -> Sequence[str]:
        """Layers of the teacher whose outputs are read."""
        return ()

    @abstractmethod
    def forward(self, seen: Inverted) -> Tensor:
        """Unweighted scalar, to be minimised by the image source."""

    def after_round(self) -> None:
        """Called when the images of a round are done."""


def terms_by_name(terms: Sequence[InversionTerm]) -> dict[str, InversionTerm]:
    """Key each term by its name in the log; equal names are numbered.

    Raises:
        TypeError: If one is something else.
    """
    named: dict[str, InversionTerm] = {}
    for term in terms:
        if not isinstance(term, InversionTerm):
            raise TypeError(f"Expected terms of type InversionTerm, got {type(term).__name__}.")
        key, count = term.name, 1
        while key in named:
            count += 1
            key = f"{term.name}_{count}"
        named[key] = term
    return named
