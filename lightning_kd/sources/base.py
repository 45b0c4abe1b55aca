from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kd.ranks import average_gradients


class ImageSource(nn.Module, ABC):
    """Makes images, and learns from a loss how to make better ones.

    A round calls ``begin``, then a number of times ``forward`` and ``descend``, then ``end``.
    """

    #: whether good images take a round to make, so that they must be remembered
    slow = False

    @property
    def resets(self) -> bool:
        """Whether ``reset`` has something to forget."""
        return False

    def make_optimizer(self) -> Optimizer | None:
        """Optimizer that outlives a round and is kept in checkpoints; None: there is none."""
        return None

    @abstractmethod
    def begin(self, count: int, shape: Sequence[int], random: torch.Generator) -> None:
        """Prepare a round of ``count`` images of ``shape`` (C, H, W)."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Images in [0, 1], shape (B, C, H, W), with gradient."""

    @abstractmethod
    def descend(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        """Take one step against the gradient of a loss of the last images."""

    def end(self, optimizer: Optimizer | None) -> None:
        """Finish the round."""

    def draw(self, count: int, shape: Sequence[int], random: torch.Generator) -> Tensor:
        """New images without gradient, shape (count, C, H, W).

        Raises:
            NotImplementedError: If this source makes images slowly, for a memory only.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot draw images at once: add the callback ReplayBuffer."
        )

    def reset(self, random: torch.Generator) -> None:
        """Forget part of what was learned, against collapse."""


def descend(loss: Tensor, parameters: Iterable[nn.Parameter | Tensor], optimizer: Any) -> None:
    """One step on these parameters alone, with gradients averaged over processes.

    Not by Lightning's ``manual_backward``: its DDP expects every parameter in each backward pass.
    """
    chosen = list(parameters)
    optimizer.zero_grad()
    torch.autograd.backward(loss, inputs=chosen)
    average_gradients(chosen)
    optimizer.step()
