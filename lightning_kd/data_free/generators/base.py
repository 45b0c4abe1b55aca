from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class BaseGenerator(nn.Module, ABC):
    """Makes images, and learns from a loss how to make better ones.

    A round calls ``start_round``, then ``forward`` and ``step`` repeatedly, then ``end_round``.
    """

    #: whether good images take a round to make, so that a replay buffer must keep them
    needs_replay = False

    @property
    def can_reset(self) -> bool:
        """Whether ``reset`` has anything to reset."""
        return False

    def make_optimizer(self) -> Optimizer | None:
        """Optimizer that outlives a round and is kept in checkpoints; ``None``: there is none."""
        return None

    @abstractmethod
    def start_round(self, count: int, shape: Sequence[int], random: torch.Generator) -> None:
        """Prepare a round of ``count`` images of ``shape`` (C, H, W)."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Images in [0, 1], shape (B, C, H, W), with gradient."""

    @abstractmethod
    def step(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        """Take one step against the gradient of a loss on the last images."""

    def end_round(self, optimizer: Optimizer | None) -> None:
        """Finish the round."""

    def sample(self, count: int, shape: Sequence[int], random: torch.Generator) -> Tensor:
        """New images without gradient, shape (count, C, H, W).

        Raises:
            NotImplementedError: If this generator takes a round to make images.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot sample images directly: add the callback ReplayBuffer."
        )

    def reset(self, random: torch.Generator) -> None:
        """Reset part of what was learned, to counter collapse."""
