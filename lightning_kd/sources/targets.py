from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Targets(ABC):
    """What the teacher is to see in the images of a round."""

    @abstractmethod
    def draw(self, count: int, num_classes: int, random: torch.Generator) -> Tensor | None:
        """Labels (B,) or probabilities (B, K); None: what it sees by itself."""


class RandomLabels(Targets):
    """Every class with the same probability, each image its own."""

    def draw(self, count: int, num_classes: int, random: torch.Generator) -> Tensor:
        """See ``Targets``."""
        return torch.randint(num_classes, (count,), generator=random, device=random.device)


class TeacherLabels(Targets):
    """The class that the teacher sees, of which it is to be surer (DAFL)."""

    def draw(self, count: int, num_classes: int, random: torch.Generator) -> None:
        """See ``Targets``."""
        return
